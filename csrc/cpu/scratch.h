// Workspace of the kernels: each thread keeps its own between calls.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace mlp_ext::cpu {

constexpr int64_t kCacheLine = 64;

struct Kept;

// Workspace of this thread while this lives, aligned to a cache line. Converts to its pointer.
class Scratch {
 public:
  ~Scratch();
  Scratch(Scratch&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), kept_(std::exchange(other.kept_, nullptr)) {}
  operator void*() const { return data_; }
  char* data() const { return static_cast<char*>(data_); }

 private:
  friend Scratch scratch(size_t bytes);
  Scratch(void* data, Kept* kept) : data_(data), kept_(kept) {}

  void* data_;
  Kept* kept_;  // nullptr: freed after use
};
// Throws if there is no memory.
[[nodiscard]] Scratch scratch(size_t bytes);

// Bytes that all threads keep, at most kMostScratchBytes while no kernel runs.
constexpr size_t kMostScratchBytes = size_t(512) << 20;
int64_t scratch_bytes();
// Frees what all threads keep, except where a kernel uses it now.
void free_scratch();

}  // namespace mlp_ext::cpu
