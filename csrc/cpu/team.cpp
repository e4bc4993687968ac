// Threads that share loops within one OpenMP region.
#include "cpu/team.h"

#include <ATen/Parallel.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <exception>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mlp_ext::cpu {

namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kMostPieces = 256;  // of a loop; more are grouped
constexpr int kGroupBits = 16;        // of Team::posted_; the others hold the generation
constexpr int kSpins = 4000;          // about 50 to 100 us: longer than the serial parts of a step
// A thread whose helpers made it wait for longer than it worked, since another process has their core, does without
// them for some regions, twice as many each time.
constexpr auto kLate = std::chrono::microseconds(50);
constexpr int64_t kMostSkipped = 64;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until ready(value): spins for a bounded time, then sleeps, so that it is right with fewer cores than threads.
template <class T, class Ready>
T wait(const std::atomic<T>& value, Ready ready, Clock::duration* slept = nullptr) {
  for (int i = 0; i < kSpins; ++i, pause())
    if (const T now = value.load(std::memory_order_acquire); ready(now)) return now;
  const auto start = Clock::now();
  T now = value.load(std::memory_order_acquire);
  for (; !ready(now); now = value.load(std::memory_order_acquire)) value.wait(now, std::memory_order_acquire);
  if (slept) *slept += Clock::now() - start;
  return now;
}

class Team {
 public:
  explicit Team(int64_t threads) : threads_(threads) {}

  int64_t threads() const { return threads_; }
  Clock::duration slept() const { return slept_; }

  // The first thread: runs a loop and returns when all its pieces are done.
  void run(int64_t pieces, const void* f, void (*piece)(const void*, int64_t)) {
    const int64_t groups = std::min(pieces, kMostPieces);
    loop_ = {f, piece, pieces, groups};
    done_.store(0, std::memory_order_relaxed);
    ++generation_;
    post(groups);
    work(generation_, groups, 0);
    wait(done_, [&](int64_t done) { return done == groups; }, &slept_);
    if (!failed_) return;
    failed_ = false;
    std::rethrow_exception(std::exchange(error_, nullptr));
  }

  // Lets the helpers go.
  void close() {
    ++generation_;
    post(0);
  }

  // A helper, from 1 on: works until close().
  void help(int64_t member) {
    for (uint64_t seen = 0;;) {
      seen = wait(posted_, [&](uint64_t posted) { return posted != seen; });
      const auto groups = static_cast<int64_t>(seen % (uint64_t(1) << kGroupBits));
      if (groups == 0) return;
      work(seen >> kGroupBits, groups, member);
    }
  }

 private:
  void post(int64_t groups) {
    posted_.store(generation_ << kGroupBits | static_cast<uint64_t>(groups), std::memory_order_release);
    posted_.notify_all();
  }

  // Claims groups, a member's own first. A late helper finds all groups of its generation claimed.
  void work(uint64_t generation, int64_t groups, int64_t member) {
    for (int64_t k = 0, g = member * groups / threads_; k < groups; ++k, g = g + 1 < groups ? g + 1 : 0) {
      uint64_t last = claimed_[g].load(std::memory_order_relaxed);
      if (last >= generation || !claimed_[g].compare_exchange_strong(last, generation, std::memory_order_acq_rel))
        continue;
      try {
        for (int64_t i = g * loop_.pieces / groups; i < (g + 1) * loop_.pieces / groups; ++i) loop_.piece(loop_.f, i);
      } catch (...) {
        if (!failed_.exchange(true)) error_ = std::current_exception();
      }
      done_.fetch_add(1, std::memory_order_acq_rel);
      done_.notify_one();
    }
  }

  struct Loop {
    const void* f;
    void (*piece)(const void*, int64_t);
    int64_t pieces, groups;
  };
  const int64_t threads_;
  Loop loop_{};
  uint64_t generation_ = 0;  // number of loops so far
  Clock::duration slept_{};
  std::exception_ptr error_;
  std::atomic<bool> failed_{false};
  alignas(64) std::atomic<uint64_t> posted_{0};  // generation, number of groups
  alignas(64) std::atomic<int64_t> done_{0};
  std::array<std::atomic<uint64_t>, kMostPieces> claimed_{};  // the last generation in which a group was claimed
};

thread_local Team* current = nullptr;
thread_local bool on_one_thread = false;

// libgomp keeps the threads of a region for the next one. A child that forks does not have them, and its first region
// would wait for them forever. So they end before a fork, and parent and child start new ones when they need them. The
// child of a runtime without this call computes on one thread.
[[maybe_unused]] const int fork_handlers = [] {
  constexpr int soft = 1;  // omp_pause_soft: settings are kept
  static const auto end_threads = reinterpret_cast<int (*)(int)>(dlsym(RTLD_DEFAULT, "omp_pause_resource_all"));
  return pthread_atfork(
      [] {
        if (end_threads) end_threads(soft);
      },
      nullptr,
      [] {
        if (!end_threads) at::set_num_threads(1);
      });
}();

struct Entered {
  explicit Entered(Team* team) : before(std::exchange(current, team)) {}
  ~Entered() { current = before; }
  Team* const before;
};

}  // namespace

OnOneThread::OnOneThread() : before_(std::exchange(on_one_thread, true)) {}
OnOneThread::~OnOneThread() { on_one_thread = before_; }

int64_t threads() {
  if (on_one_thread) return 1;
  return current ? current->threads() : at::in_parallel_region() ? 1 : at::get_num_threads();
}

void in_region_of(const void* body, void (*run)(const void*)) {
  const int64_t size = threads();
  if (current || size == 1) return run(body);
  thread_local int64_t skip = 0, skipped = 0;
  const bool alone = skip > 0;
  if (alone) --skip;
  Team team(size);
  Clock::time_point begin, end;
  const c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
  at::parallel_for(0, alone ? 1 : size, 1, [&](int64_t first, int64_t) {
    if (first > 0) {
      const c10::impl::ForceDispatchKeyGuard same_keys(keys);  // so that operators dispatch as in the first thread
      if (can_help()) team.help(first);
      return;
    }
    const Entered entered(&team);
    begin = Clock::now();
    try {
      run(body);
    } catch (...) {
      team.close();
      throw;
    }
    end = Clock::now();
    team.close();
  });
  if (alone) return;
  const auto waited = Clock::now() - end + team.slept();
  const bool late = waited > std::max<Clock::duration>(kLate, end - begin - team.slept());
  skipped = late ? std::min(kMostSkipped, 2 * skipped + 1) : skipped / 2;
  skip = late ? skipped : 0;
}

void run_pieces(int64_t pieces, const void* f, void (*run)(const void*, int64_t)) {
  in_region([&] {
    if (Team* const team = current) {
      const Entered none(nullptr);
      return team->run(pieces, f, run);
    }
    for (int64_t i = 0; i < pieces; ++i) run(f, i);
  });
}

}  // namespace mlp_ext::cpu
