// Cached memory for the kernels' results.
#pragma once

#include <ATen/core/Tensor.h>

namespace mlp_ext::cpu {

// at::empty, contiguous. Memory of large results is cached when they are freed.
at::Tensor empty_cached(at::IntArrayRef sizes, at::ScalarType dtype);

int64_t cached_bytes();  // in freed blocks now

}  // namespace mlp_ext::cpu
