// Workspace of the kernels: each thread keeps its own between calls.
#include "cpu/scratch.h"

#include <c10/util/Exception.h>

#include <atomic>
#include <cstdlib>
#include <utility>

#include "cpu/caching_allocator.h"

namespace mlp_ext::cpu {

namespace {

std::atomic<size_t> total{0};

}  // namespace

// What a thread keeps. There are as many as there were threads at a time; they are never freed, and form a list without
// locks, since a child that forked must not wait for a lock of a thread that it does not have.
struct Kept {
  std::atomic<bool> owned{true}, taken{false};  // taken: used by a kernel, or being freed
  void* data = nullptr;
  size_t bytes = 0;
  Kept* next = nullptr;

  bool take() { return !taken.exchange(true, std::memory_order_acquire); }
  void give_back() { taken.store(false, std::memory_order_release); }

  // While taken.
  void free() {
    std::free(std::exchange(data, nullptr));
    total -= std::exchange(bytes, 0);
  }
  bool grow(size_t size) {
    free();
    const size_t page = size >= kHugePage ? kHugePage : kCacheLine;
    data = std::aligned_alloc(page, (size + page - 1) / page * page);
    if (!data) return false;
    advise_huge_pages(data, size);
    total += bytes = size;
    return true;
  }
};

namespace {

std::atomic<Kept*> first{nullptr};

Kept* own() {
  for (Kept* k = first; k; k = k->next)
    if (bool owned = false; k->owned.compare_exchange_strong(owned, true)) return k;
  Kept* const made = new Kept;
  made->next = first;
  while (!first.compare_exchange_weak(made->next, made)) {
  }
  return made;
}

struct Owner {
  Kept* const kept = own();
  ~Owner() {
    if (kept->take()) {
      kept->free();
      kept->give_back();
    }
    kept->owned = false;
  }
};

}  // namespace

Scratch scratch(size_t bytes) {
  thread_local const Owner owner;
  Kept& kept = *owner.kept;
  const size_t size = (bytes + kCacheLine - 1) / kCacheLine * kCacheLine;
  const bool taken = kept.take();
  void* data = nullptr;
  if (!taken)  // by free_scratch, in another thread
    data = std::aligned_alloc(kCacheLine, size);
  else if (kept.bytes >= size || kept.grow(size))
    data = kept.data;
  else
    kept.give_back();
  TORCH_CHECK(data || size == 0, "mlp_ext: no memory for ", bytes, " bytes of workspace");
  return {data, taken ? &kept : nullptr};
}

Scratch::~Scratch() {
  if (!kept_) {
    std::free(data_);
    return;
  }
  if (total > kMostScratchBytes) kept_->free();
  kept_->give_back();
}

int64_t scratch_bytes() { return static_cast<int64_t>(total.load()); }

void free_scratch() {
  for (Kept* k = first; k; k = k->next) {
    if (!k->take()) continue;
    k->free();
    k->give_back();
  }
}

}  // namespace mlp_ext::cpu
