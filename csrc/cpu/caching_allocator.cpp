// Memory for the kernels' results, kept when they are freed.
//
// malloc returns large blocks to the system, which maps and zeroes every page again for the next result, in training at
// every step. This allocator caches freed blocks, up to a bound, and reuses them for results of about the same size.
#include "cpu/caching_allocator.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <pthread.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <charconv>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string_view>
#include <vector>

#include "cpu/scratch.h"

namespace mlp_ext::cpu {

namespace {

constexpr size_t kLeastBytes = size_t(128) << 10;  // smaller blocks are left to malloc, which caches them
constexpr size_t kDefaultMiB = 256;                // bound of the cache, unless MLP_EXT_RESULTS_MIB is set
constexpr size_t kMostMiB = size_t(1) << 30;       // fits size_t in bytes

struct Block {
  void* data = nullptr;
  size_t bytes;
  void (*free)(void*) = std::free;  // matches the allocation: c10's may be mimalloc

  explicit Block(size_t size) : bytes(size) {
    constexpr size_t page = kHugePage;
    if (bytes >= page) data = std::aligned_alloc(page, (bytes + page - 1) / page * page);
    if (data) {
      advise_huge_pages(data, bytes);
      return;
    }
    data = c10::alloc_cpu(bytes);  // throws if out of memory
    free = c10::free_cpu;
  }
  Block(const Block&) = delete;
  ~Block() { free(data); }
};
using BlockPtr = std::unique_ptr<Block>;

class CachedBlocks {
 public:
  // A cached block of at least `bytes`, at most an eighth larger, or nullptr.
  BlockPtr take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    // Last freed first: it may still be in a CPU cache.
    for (auto block = blocks_.rbegin(); block != blocks_.rend(); ++block) {
      if ((*block)->bytes < bytes || (*block)->bytes > bytes + bytes / 8) continue;
      BlockPtr found = std::move(*block);
      blocks_.erase(std::next(block).base());
      bytes_ -= found->bytes;
      return found;
    }
    return nullptr;
  }

  void put(BlockPtr block) {
    if (block->bytes > most_bytes_) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    bytes_ += block->bytes;
    blocks_.push_back(std::move(block));
    while (bytes_ > most_bytes_) {
      bytes_ -= blocks_.front()->bytes;
      blocks_.erase(blocks_.begin());
    }
  }

  size_t bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return bytes_;
  }

  void free_all() {
    const std::lock_guard<std::mutex> lock(mutex_);
    blocks_.clear();
    bytes_ = 0;
  }

  // Around a fork, so that the child does not find the lock held by a thread that it does not have.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  static size_t bound() {
    const char* const value = std::getenv("MLP_EXT_RESULTS_MIB");
    if (!value) return kDefaultMiB << 20;
    const std::string_view text(value);
    size_t mib = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), mib);
    TORCH_CHECK_VALUE(error == std::errc() && end == text.data() + text.size() && mib <= kMostMiB,
                      "MLP_EXT_RESULTS_MIB must be a whole number from 0 to ", kMostMiB, ", got '", text, "'");
    return mib << 20;
  }

  const size_t most_bytes_ = bound();
  std::mutex mutex_;
  std::vector<BlockPtr> blocks_;  // oldest first
  size_t bytes_ = 0;
};

CachedBlocks& cached_blocks() {
  static CachedBlocks* const blocks = [] {
    auto* const made = new CachedBlocks;  // outlives every tensor
    const auto unlock = [] { cached_blocks().unlock(); };
    pthread_atfork([] { cached_blocks().lock(); }, unlock, unlock);
    return made;
  }();
  return *blocks;
}

void free_result(void* context) {
  BlockPtr block(static_cast<Block*>(context));
  c10::profiledCPUMemoryReporter().Delete(block->data);
  cached_blocks().put(std::move(block));
}

struct CachingAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    if (n < kLeastBytes) return c10::GetCPUAllocator()->allocate(n);
    BlockPtr block = cached_blocks().take(n);
    if (!block) block = std::make_unique<Block>(n);
    void* const data = block->data;
    c10::profiledCPUMemoryReporter().New(data, n);
    return {data, block.release(), free_result, at::Device(at::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
};

}  // namespace

void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  madvise(data, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);  // a hint: an error changes nothing
#endif
}

at::Tensor empty_cached(at::IntArrayRef sizes, at::ScalarType dtype) {
  static auto* const allocator = new CachingAllocator;
  constexpr c10::DispatchKeySet cpu(c10::DispatchKey::CPU);
  const at::Tensor result(at::detail::empty_generic(sizes, allocator, cpu, dtype, std::nullopt));
  const auto& context = at::globalContext();
  if (result.is_floating_point() && context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory())
    result.fill_(NAN);
  return result;
}

int64_t cached_bytes() { return static_cast<int64_t>(cached_blocks().bytes()); }

void empty_cache() {
  cached_blocks().free_all();
  free_scratch();
#if defined(__GLIBC__)
  malloc_trim(0);  // what malloc would keep
#endif
}

}  // namespace mlp_ext::cpu
