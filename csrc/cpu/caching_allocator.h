// Memory for the kernels' results.
#pragma once

#include <ATen/core/Tensor.h>

namespace mlp_ext::cpu {

// As at::empty, of contiguous memory. What a large result leaves when it is freed waits for the next one.
at::Tensor empty_cached(at::IntArrayRef sizes, at::ScalarType dtype);

int64_t cached_bytes();  // by all of it now

}  // namespace mlp_ext::cpu
