// Cached memory for the kernels' results.
#pragma once

#include <ATen/core/Tensor.h>

namespace mlp_ext::cpu {

// at::empty, contiguous. Memory of large results is cached when they are freed.
at::Tensor empty_cached(at::IntArrayRef sizes, at::ScalarType dtype);

// For memory aligned to such pages: one page fault in place of 512, and fewer misses of the TLB.
constexpr int64_t kHugePage = int64_t(2) << 20;
void advise_huge_pages(void* data, size_t bytes);

int64_t cached_bytes();  // in freed blocks now

// Frees them and the threads' workspaces (scratch.h), and returns their memory to the system.
void empty_cache();

}  // namespace mlp_ext::cpu
