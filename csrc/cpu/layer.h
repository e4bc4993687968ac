// One layer on raw pointers: runs the plan's path on all threads.
#pragma once

#include <ATen/Parallel.h>

#include "cpu/kernels.h"
#include "cpu/machines.h"

namespace mlp_ext::cpu {

// A layer as the plan sees it.
LayerShape shape_of(int64_t M, int64_t K, int64_t N, DType dtype);

void forward_layer(const Forward& problem, DType dtype);
// With update_w or update_b, pass no dw and db; the parameters are updated once W is no longer read.
void backward_layer(const Backward& problem, DType dtype);

// This thread's workspace, aligned to a cache line and kept between calls.
constexpr int64_t kCacheLine = 64;
void* scratch(size_t bytes);

// Piece i of n of [0, size).
inline Range piece(int64_t i, int64_t n, int64_t size) { return {i * size / n, (i + 1) * size / n}; }
// The same, split at multiples of a cache line.
Range piece_of_lines(int64_t i, int64_t n, int64_t size);

// Runs f(i) for every piece, each on a thread of its own.
template <class F>
void for_pieces(int64_t pieces, const F& f) {
  if (pieces == 1) return f(0);  // at::parallel_for is slow for small networks
  at::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// The machine's limits for a dtype.
const Limits& limits_of(DType dtype);

int64_t threads();  // used by at::parallel_for here

}  // namespace mlp_ext::cpu
