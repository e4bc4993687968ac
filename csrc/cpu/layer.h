// One layer on raw pointers: runs the plan's path on all threads.
#pragma once

#include "cpu/kernels.h"
#include "cpu/machines.h"
#include "cpu/scratch.h"
#include "cpu/team.h"

namespace mlp_ext::cpu {

void forward_layer(const Forward& given, DType dtype);
// With update_w or update_b, pass no dw and db; the parameters are updated once W is no longer read. memory:
// backward_bytes() of it, or nullptr.
void backward_layer(const Backward& given, DType dtype, void* memory = nullptr);
int64_t backward_bytes(const Backward& problem, DType dtype);
// Whether it allocates memory in spite of that, as torch's GEMM does.
bool backward_allocates(const Backward& problem, DType dtype);

// Whether a part of such a layer is left to torch's GEMM, which runs on one thread in a region.
bool takes_library(int64_t M, int64_t K, int64_t N, DType dtype, bool update);

// Piece i of n of [0, size).
inline Range piece(int64_t i, int64_t n, int64_t size) { return {i * size / n, (i + 1) * size / n}; }
// The same, split at multiples of a cache line, or of as many elements.
Range piece_of_lines(int64_t i, int64_t n, int64_t size, int64_t line = 16);

// The machine's limits for a dtype.
const Limits& limits_of(DType dtype);

}  // namespace mlp_ext::cpu
