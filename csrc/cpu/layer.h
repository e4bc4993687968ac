// One layer on raw pointers: the plan's path, its pieces on the threads.
#pragma once

#include <ATen/Parallel.h>

#include "cpu/kernels.h"

namespace mlp_ext::cpu {

void forward_layer(const Forward& problem, DType dtype);
// With updates the problem's dw and db are left out, and the parameters change once W is no longer read.
void backward_layer(const Backward& problem, DType dtype);

// Scratch memory of this thread, aligned to a cache line and kept for the next call.
constexpr int64_t kCacheLine = 64;
void* scratch(size_t bytes);

// Piece i of n of [0, size).
inline Range piece(int64_t i, int64_t n, int64_t size) { return {i * size / n, (i + 1) * size / n}; }
// The same, cut at multiples of a cache line's elements.
Range piece_of_lines(int64_t i, int64_t n, int64_t size);

// f(i) for each of so many pieces, on as many threads.
template <class F>
void for_pieces(int64_t pieces, const F& f) {
  if (pieces == 1) return f(0);  // at::parallel_for itself would cost a small network dearly
  at::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

int64_t threads();  // that a parallel_for here would use

}  // namespace mlp_ext::cpu
