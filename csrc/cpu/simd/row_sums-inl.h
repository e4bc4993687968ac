// Sums over rows.
#pragma once

#include "cpu/kernels.h"

namespace mlp_ext::cpu {
namespace {

// Calls f(P, m) for P rows from m on, with P a compile-time constant.
template <class F>
void for_rows(Range samples, const F& f) {
  int64_t m = samples.begin;
  for (; m + 4 <= samples.end; m += 4) f(std::integral_constant<int, 4>{}, m);
  for (; m < samples.end; ++m) f(std::integral_constant<int, 1>{}, m);
}

// A plain sum of this many rows is at most 64 ULP off. Longer sums add such chunks in double.
constexpr int64_t kShortRows = 128;

// Calls f(rows) for chunks of up to kShortRows.
template <class F>
void for_row_chunks(Range samples, const F& f) {
  for (int64_t m = samples.begin; m < samples.end; m += kShortRows) f(Range{m, std::min(m + kShortRows, samples.end)});
}

// total[i] += piece[i]
template <class T>
void add_up(double* total, const T* piece, int64_t size) {
  for (int64_t i = 0; i < size; ++i) total[i] += static_cast<double>(piece[i]);
}

template <class T>
void round_sums(const double* total, int64_t size, T* out) {
  for (int64_t i = 0; i < size; ++i) out[i] = static_cast<T>(total[i]);
}

}  // namespace
}  // namespace mlp_ext::cpu
