// CUDA's execution model on one core of the CPU, for the kernels' own source (csrc/cuda/kernels/*.cuh): the threads of
// a block are fibers that run from barrier to barrier in a chosen order, blocks come in a shuffled order, and every
// access is checked: bounds, alignment and races, that is, two threads at one place, one of them writing, with nothing
// in between that orders them: a barrier within a block, __syncwarp within a warp; from block to block a fence, an
// atomic and a fence, each ordered after the one before by barriers. A thread that misses a barrier that others wait
// at, or waits at another one, is a fault; so is one that misses an operation of its warp whose mask names it.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <source_location>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __launch_bounds__(...)

struct Index {
  unsigned x, y;
};
inline Index threadIdx, blockIdx, gridDim;

#if defined(MUTANT)
extern "C" {
inline int mutant = -1;  // of those that tests/test_cuda_mutants.py compiles together
}
#endif

// 16-bit types, converted as CUDA does: to nearest, ties to even.
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  _Float16 value;
};
inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t bits = uint32_t{v.bits} << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline __nv_bfloat16 __float2bfloat16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (f != f) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline float __half2float(__half v) { return static_cast<float>(v.value); }
inline __half __float2half(float f) { return {static_cast<_Float16>(f)}; }

namespace mlp_ext::cuda::model {

constexpr int kWarp = 32;
template <class T>
using Lanes = std::array<T, kWarp>;

struct Use {  // by whom, and between which barriers of which block
  int64_t block = -1, barriers = -1;
  int warp = -1;       // -1: several
  unsigned lanes = 0;  // of the warp
  int64_t syncs = -1;  // of warps in the block, before the last of these uses
};
struct Word {  // two bytes of shared memory, or an element of global memory
  Use written, read;
};

struct Block {         // the one that runs
  int64_t number = 0;  // in the order of running
  std::vector<unsigned char> shared;
  std::vector<Word> words;
  int64_t barriers = 0, syncs = 0;
  bool any[2] = {};                    // of __syncthreads_or, at this barrier and, while that is read, at the next
  int64_t atomic = -1, acquired = -1;  // barriers before its first atomic, before its first fence ordered after that
};
inline Block block;
inline std::unordered_map<uintptr_t, Word> global_words;  // of this launch
inline std::vector<bool> published;                       // of a block: all that it wrote is fenced, then an atomic
inline std::string fault_seen;                            // the first
inline ucontext_t scheduler;
enum class State { ready, at_barrier, in_warp, finished };
struct Fiber {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack;
  State state;
  unsigned line;          // of the barrier it waits at
  int64_t wrote, fenced;  // barriers before its last write to global memory, before its last fence; -1: none
  bool dirty;             // wrote after that fence
  bool atomic, acquired;  // had an atomic; a fence ordered after one
  const char* operation;  // of the warp, which it waits in
  unsigned mask;
  Lanes<uint64_t> brought;  // to that operation, by each lane
  Lanes<int64_t> seen;      // of each lane, the uses up to so many syncs come before what this thread does
  std::vector<std::function<void()>> copies;  // asynchronous, not waited for yet
};
inline std::vector<Fiber> fibers;

// Ends the run: the fiber is left where it is.
inline void fault(const std::string& what) {
  if (fault_seen.empty())
    fault_seen = what + " in thread " + std::to_string(threadIdx.x) + " of block " + std::to_string(blockIdx.x) + "," +
                 std::to_string(blockIdx.y);
  swapcontext(&fibers[threadIdx.x].context, &scheduler);
}

// Fences are sequentially consistent: a writer's and a reader's own serve as well as those beside the atomic.
inline void fence() {
  Fiber& self = fibers[threadIdx.x];
  self.dirty = false;
  self.fenced = block.barriers;
  if (!self.atomic && (block.atomic < 0 || block.atomic == block.barriers)) return;
  self.acquired = true;
  if (block.acquired < 0) block.acquired = block.barriers;
}
inline void atomic() {
  Fiber& self = fibers[threadIdx.x];
  published[block.number] = std::all_of(fibers.begin(), fibers.end(), [&](const Fiber& f) {
    const bool by_itself = !f.dirty && (&f == &self || f.fenced < block.barriers);
    return f.wrote < 0 || by_itself || f.wrote < self.fenced;
  });
  self.atomic = true;
  if (block.atomic < 0) block.atomic = block.barriers;
}

// An asynchronous copy arrives when its thread waits for it.
inline void copy_later(std::function<void()> copy) { fibers[threadIdx.x].copies.push_back(std::move(copy)); }
inline void copy_now() {
  for (const auto& copy : std::exchange(fibers[threadIdx.x].copies, {})) copy();
}

inline void use(Word& word, bool writes, const std::string& where) {
  const int lane = threadIdx.x % kWarp;
  const Use now{block.number, block.barriers, static_cast<int>(threadIdx.x / kWarp), 1u << lane, block.syncs};
  const Fiber& self = fibers[threadIdx.x];
  const auto races = [&](const Use& before) {
    if (before.block < 0) return false;
    if (before.block != now.block) {
      const bool acquired = self.acquired || (block.acquired >= 0 && block.acquired < now.barriers);
      return !published[before.block] || !acquired;
    }
    if (before.barriers != now.barriers || (before.warp == now.warp && before.lanes == now.lanes)) return false;
    if (before.warp != now.warp) return true;
    for (int l = 0; l < kWarp; ++l)
      if (l != lane && (before.lanes >> l & 1) && before.syncs > self.seen[l]) return true;
    return false;
  };
  if (races(word.written)) fault("a race for" + where + ", after a write,");
  if (writes && races(word.read)) fault("a race for" + where + ", after a read,");
  Use& last = writes ? word.written : word.read;
  const Use before = last;
  last = now;
  if (writes || before.block != now.block || !races(before)) return;
  last.warp = before.warp == now.warp ? now.warp : -1;
  last.lanes |= before.lanes;
}

// A pointer that knows the array it points into.
template <class T>
class Pointer {
 public:
  using Element = std::remove_const_t<T>;
  class Reference {
   public:
    explicit Reference(Pointer place) : place_(place) {}
    operator Element() const {
      Element value[1];
      place_.read(value);
      return value[0];
    }
    const Reference& operator=(const Element& value) const {
      const Element values[1] = {value};
      place_.write(values);
      return *this;
    }
    const Reference& operator=(const Reference& other) const { return *this = Element(other); }
    const Reference& operator+=(const Element& value) const { return *this = Element(*this) + value; }

   private:
    Pointer place_;
  };

  Pointer(std::nullptr_t = nullptr) {}
  Pointer(T* begin, int64_t count, bool shared = false) : begin_(begin), count_(count), shared_(shared) {}
  template <class U, class = std::enable_if_t<std::is_same_v<const U, T>>>
  Pointer(const Pointer<U>& other)
      : begin_(other.begin()), count_(other.count()), at_(other.offset()), shared_(other.shared()) {}

  explicit operator bool() const { return begin_; }
  Reference operator[](int64_t i) const { return Reference(*this + i); }
  Reference operator*() const { return Reference(*this); }
  friend Pointer operator+(Pointer p, int64_t n) {
    p.at_ += n;
    return p;
  }

  template <size_t n>
  void read(Element (&values)[n]) const {
    check(n, false);
    std::memcpy(values, begin_ + at_, sizeof(values));
  }
  template <size_t n>
  void write(const Element (&values)[n]) const {
    check(n, true);
    std::memcpy(begin_ + at_, values, sizeof(values));
  }

  // n elements of shared memory hold nothing until they are written again.
  void forget(int64_t n) const {
    const size_t first = reinterpret_cast<uintptr_t>(begin_ + at_) - reinterpret_cast<uintptr_t>(block.shared.data());
    for (size_t i = first / 2; i < (first + n * sizeof(T) + 1) / 2; ++i) block.words[i].written = Use();
  }

  T& of_atomic() const {
    if (at_ < 0 || at_ >= count_) fault("an atomic outside of its array");
    return begin_[at_];
  }

  T* begin() const { return begin_; }
  int64_t count() const { return count_; }
  int64_t offset() const { return at_; }
  bool shared() const { return shared_; }

 private:
  void check(int64_t n, bool writes) const {
    static const std::string kShared = " shared memory", kGlobal = " global memory";
    const std::string& where = shared_ ? kShared : kGlobal;
    const size_t bytes = n * sizeof(T), piece = std::min<size_t>(16, bytes);
    if (!begin_) fault("a null pointer");
    if (at_ < 0 || at_ + n > count_)
      fault("element " + std::to_string(at_ + n - 1) + " of " + std::to_string(count_) + " in" + where);
    const auto address = reinterpret_cast<uintptr_t>(begin_ + at_);
    if (address % piece != 0) fault("a misaligned access to" + where);
    if (shared_) {
      const size_t first = address - reinterpret_cast<uintptr_t>(block.shared.data());
      for (size_t i = first / 2; i < (first + bytes + 1) / 2; ++i) {
        if (!writes && block.words[i].written.block < 0) fault("a read of shared memory that nobody wrote");
        use(block.words[i], writes, where);
      }
    } else {
      for (int64_t i = 0; i < n; ++i) use(global_words[address + i * sizeof(T)], writes, where);
      if (!writes) return;
      fibers[threadIdx.x].wrote = block.barriers;
      fibers[threadIdx.x].dirty = true;
      published[block.number] = false;
    }
  }

  T* begin_ = nullptr;
  int64_t count_ = 0, at_ = 0;
  bool shared_ = false;
};

template <class S>
bool aligned(const Pointer<S>& p, size_t bytes) {
  return reinterpret_cast<uintptr_t>(p.begin()) % bytes == 0 && p.offset() * sizeof(S) % bytes == 0;
}

// Pieces of the block's dynamic shared memory, each with bounds of its own.
class SharedMemory {
 public:
  template <class T>
  Pointer<T> take(int count) {
    const size_t begin = used_;
    used_ += (count * sizeof(T) + 15) / 16 * 16;
    if (used_ > block.shared.size()) fault("more shared memory than the launch gives");
    return {reinterpret_cast<T*>(block.shared.data() + begin), count, true};
  }

 private:
  size_t used_ = 0;
};

enum class Order { ascending, descending, shuffled };  // of the threads between barriers

inline std::function<void()> body;
inline void enter() {
  body();
  fibers[threadIdx.x].state = State::finished;
  swapcontext(&fibers[threadIdx.x].context, &scheduler);
}

// What the lanes of the mask brought to this operation of their warp, once all are there: stricter than CUDA, which
// does not wait for threads that have ended. Only __syncwarp orders their accesses.
inline const Lanes<uint64_t>& meet(const char* operation, unsigned mask, uint64_t brought) {
  Fiber& self = fibers[threadIdx.x];
  const int lane = threadIdx.x % kWarp;
  if (!(mask >> lane & 1)) fault(std::string(operation) + " with a mask without its own lane");
  self.operation = operation;
  self.mask = mask;
  self.brought[lane] = brought;
  self.state = State::in_warp;
  swapcontext(&self.context, &scheduler);
  return self.brought;
}

inline constexpr const char* kSyncWarp = "__syncwarp";

// Lets go on who waits in an operation that all lanes of its mask wait in; returns whether there is one.
inline bool release_warps() {
  bool any = false;
  for (size_t t = 0; t < fibers.size(); ++t) {
    if (fibers[t].state != State::in_warp) continue;
    const auto [operation, mask] = std::pair(fibers[t].operation, fibers[t].mask);
    std::vector<size_t> met;
    for (size_t l = 0, f = t / kWarp * kWarp; l < kWarp && f < fibers.size(); ++l, ++f)
      if ((mask >> l & 1) && fibers[f].state == State::in_warp && fibers[f].mask == mask &&
          std::strcmp(fibers[f].operation, operation) == 0)
        met.push_back(f);
    if (met.size() != static_cast<size_t>(std::popcount(mask))) continue;
    any = true;
    Lanes<uint64_t> brought{};
    Lanes<int64_t> seen = fibers[t].seen;
    for (const size_t f : met) {
      brought[f % kWarp] = fibers[f].brought[f % kWarp];
      for (int l = 0; l < kWarp; ++l) seen[l] = std::max(seen[l], fibers[f].seen[l]);
    }
    for (const size_t f : met) seen[f % kWarp] = block.syncs;
    const bool syncs = operation == kSyncWarp;
    block.syncs += syncs;
    for (const size_t f : met) {
      fibers[f].brought = brought;
      if (syncs) fibers[f].seen = seen;
      fibers[f].state = State::ready;
    }
  }
  return any;
}

inline void run_block(int threads, int64_t shared, Order order, std::mt19937& random) {
  constexpr size_t kStack = 64 << 10;
  block.shared.assign(shared, 0xff);  // NaN
  block.words.assign(shared / 2 + 1, Word());
  block.barriers = block.syncs = 0;
  block.any[0] = block.any[1] = false;
  block.atomic = block.acquired = -1;
  fibers.resize(threads);
  std::vector<int> turns(threads);
  std::iota(turns.begin(), turns.end(), 0);
  if (order == Order::descending) std::reverse(turns.begin(), turns.end());
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    if (!fiber.stack) fiber.stack.reset(new unsigned char[kStack]);
    fiber.state = State::ready;
    fiber.wrote = fiber.fenced = -1;
    fiber.dirty = fiber.atomic = fiber.acquired = false;
    fiber.seen.fill(-1);
    fiber.copies.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (;; ++block.barriers) {
    if (order == Order::shuffled) std::shuffle(turns.begin(), turns.end(), random);
    for (Fiber& fiber : fibers)
      if (fiber.state == State::at_barrier) fiber.state = State::ready;
    do
      for (const int t : turns) {
        threadIdx = {static_cast<unsigned>(t), 0};
        if (fibers[t].state == State::ready) swapcontext(&scheduler, &fibers[t].context);
        if (!fault_seen.empty()) return;
      }
    while (release_warps());
    const auto in = [](State state) { return [=](const Fiber& f) { return f.state == state; }; };
    const auto stuck = std::find_if(fibers.begin(), fibers.end(), in(State::in_warp));
    if (stuck != fibers.end()) fault_seen = std::string(stuck->operation) + " that some of its mask never reach";
    if (!fault_seen.empty()) return;
    const auto finished = std::count_if(fibers.begin(), fibers.end(), in(State::finished));
    if (finished == threads) return;
    const auto apart = [](const Fiber& f) { return f.line != fibers[0].line; };
    if (finished > 0) fault_seen = "a barrier that some threads never reach";
    if (finished == 0 && std::any_of(fibers.begin(), fibers.end(), apart))
      fault_seen = "two barriers waited at at once";
    if (!fault_seen.empty()) return;
  }
}

// Runs a kernel; returns "" or what went wrong first.
template <class Launch>
std::string run(const Launch& launch, Order order, unsigned seed, const std::function<void()>& kernel) {
  std::mt19937 random(seed);
  std::vector<int64_t> blocks(launch.blocks());
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), random);
  fault_seen.clear();
  global_words.clear();
  published.assign(blocks.size(), false);
  block.number = 0;
  body = kernel;
  gridDim = {static_cast<unsigned>(launch.blocks_x), static_cast<unsigned>(launch.blocks_y)};
  for (const int64_t b : blocks) {
    blockIdx = {static_cast<unsigned>(b % launch.blocks_x), static_cast<unsigned>(b / launch.blocks_x)};
    run_block(launch.threads, launch.shared, order, random);
    if (!fault_seen.empty()) break;
    ++block.number;
  }
  return fault_seen;
}

}  // namespace mlp_ext::cuda::model

inline void __syncthreads(std::source_location where = std::source_location::current()) {
  using namespace mlp_ext::cuda::model;
  Fiber& self = fibers[threadIdx.x];
  self.state = State::at_barrier;
  self.line = where.line();
  swapcontext(&self.context, &scheduler);
}
inline bool __syncthreads_or(bool value, std::source_location where = std::source_location::current()) {
  using mlp_ext::cuda::model::block;
  const int64_t here = block.barriers;
  block.any[here % 2] |= value;
  __syncthreads(where);
  block.any[(here + 1) % 2] = false;
  return block.any[here % 2];
}
inline void __threadfence() { mlp_ext::cuda::model::fence(); }
inline unsigned atomicInc(const mlp_ext::cuda::model::Pointer<unsigned>& p, unsigned most) {
  mlp_ext::cuda::model::atomic();
  unsigned& value = p.of_atomic();
  const unsigned before = value;
  value = before >= most ? 0 : before + 1;
  return before;
}

#include "warp.h"
