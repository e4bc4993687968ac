// Sums over rows.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace mlp_ext::cpu {
namespace {

// f(P, m) for rows m, P of them at a time, P a constant.
template <class F>
void for_rows(Range samples, const F& f) {
  int64_t m = samples.begin;
  for (; m + 4 <= samples.end; m += 4) f(std::integral_constant<int, 4>{}, m);
  for (; m < samples.end; ++m) f(std::integral_constant<int, 1>{}, m);
}

// f(rows) for short pieces, whose sums are then added up: long plain sums would lose digits.
template <class F>
void for_short_sums(Range samples, const F& f) {
  constexpr int64_t rows = 128;
  for (int64_t m = samples.begin; m < samples.end; m += rows) f(Range{m, std::min(m + rows, samples.end)});
}

// total[i] += piece[i]
template <class T>
void add_up(T* total, const T* piece, int64_t size) {
  for_vectors<T>(
      size, [&](int64_t i, auto lanes) { store(total + i, load(total + i, lanes) + load(piece + i, lanes), lanes); });
}

}  // namespace
}  // namespace mlp_ext::cpu
