// Backward where K = 1 or N = 1: dx, dW and db in one pass row by row. grad_z(m, n, lanes) is dz at row m, columns n...
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/pack-inl.h"
#include "cpu/simd/row_sums-inl.h"
#include "cpu/simd/vec-inl.h"

namespace mlp_ext::cpu {
namespace {

template <class S>
Accumulator<S> scalar(const S* p) {
  if constexpr (std::is_same_v<S, Accumulator<S>>)
    return *p;
  else
    return load(p, 1).v[0];
}

// K = 1: lanes run along N. scratch: [2, N] of double, [3, N] of T.
template <class S, class GradZ, class T = Accumulator<S>>
void one_input(const Backward& b, const GradZ& grad_z, Range samples, T* dw, T* db, void* scratch) {
  using V = Vec<T>;
  double *const dw_total = static_cast<double*>(scratch), *const db_total = dw_total + b.N;  // [N] each
  T *const w = reinterpret_cast<T*>(db_total + b.N), *const dw_piece = w + b.N, *const db_piece = dw_piece + b.N;
  std::fill(dw_total, db_total + b.N, 0.0);
  for (int64_t n = 0; n < b.N; ++n) w[n] = b.dx.data ? scalar(at<S>(b.w, n, 0)) : T(0);
  for_row_chunks(samples, [&](Range piece) {
    std::fill(dw_piece, db_piece + b.N, T(0));
    for_rows(piece, [&](auto count, int64_t m) {
      constexpr int P = decltype(count)::value;
      V dx[P], x[P];
      for (int p = 0; dw && p < P; ++p) x[p] = scalar(at<S>(b.x, m + p, 0));
      for_vectors<T>(b.N, [&](int64_t n, auto lanes) {
        const V wn = load(w + n, lanes);
        V dw_sum, db_sum;
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
          const V dz = grad_z(m + p, n, lanes);
          dx[p] = dx[p] + dz * wn;
          dw_sum = dw_sum + dz * x[p];
          db_sum = db_sum + dz;
        }
        store(dw_piece + n, load(dw_piece + n, lanes) + dw_sum, lanes);
        store(db_piece + n, load(db_piece + n, lanes) + db_sum, lanes);
      });
      for (int p = 0; b.dx.data && p < P; ++p) store(at<S>(b.dx, m + p, 0), V(sum_lanes(dx[p])), 1);
    });
    add_up(dw_total, dw_piece, b.N);
    add_up(db_total, db_piece, b.N);
  });
  if (dw) round_sums(dw_total, b.N, dw);
  if (db) round_sums(db_total, b.N, db);
}

// K = N = 1, each a column without gaps: lanes run along the rows.
template <class S, class GradZ, class T = Accumulator<S>>
void one_weight(const Backward& b, const GradZ& grad_z, Range samples, T* dw, T* db) {
  using V = Vec<T>;
  const V w = b.dx.data ? scalar(at<S>(b.w, 0, 0)) : T(0);
  double dw_total = 0, db_total = 0;
  for_row_chunks(samples, [&](Range piece) {
    V dw_sums, db_sums;
    for_vectors<T>(piece.size(), [&](int64_t i, auto lanes) {
      const int64_t m = piece.begin + i;
      const V dz = grad_z(0, m, lanes);
      db_sums = db_sums + dz;
      if (dw) dw_sums = dw_sums + dz * load(at<S>(b.x, 0, m), lanes);
      if (b.dx.data) store(at<S>(b.dx, 0, m), dz * w, lanes);
    });
    dw_total += sum_lanes(dw_sums);
    db_total += sum_lanes(db_sums);
  });
  if (dw) *dw = static_cast<T>(dw_total);
  if (db) *db = static_cast<T>(db_total);
}

// N = 1: lanes run along K. scratch: [K] of double, [K] of T.
template <class S, class GradZ, class T = Accumulator<S>>
void one_output(const Backward& b, const GradZ& grad_z, Range samples, T* dw, T* db, void* scratch) {
  using V = Vec<T>;
  const auto gapless = [](const ConstMatrix& m) { return !m.data || m.stride == 1; };
  if (b.K == 1 && gapless(b.dy) && gapless(b.y) && gapless(b.x)) return one_weight<S>(b, grad_z, samples, dw, db);
  double* const dw_total = static_cast<double*>(scratch);
  T* const dw_piece = reinterpret_cast<T*>(dw_total + b.K);
  std::fill(dw_total, dw_total + b.K, 0.0);
  double db_total = 0;
  for_row_chunks(samples, [&](Range piece) {
    T db_piece = 0;
    if (dw) std::fill(dw_piece, dw_piece + b.K, T(0));
    for_rows(piece, [&](auto count, int64_t m) {
      constexpr int P = decltype(count)::value;
      T dz[P], db_rows = 0;
      for (int p = 0; p < P; ++p) db_rows += dz[p] = grad_z(m + p, 0, 1).v[0];
      db_piece += db_rows;
      for_vectors<T>(b.dx.data || dw ? b.K : 0, [&](int64_t k, auto lanes) {
        for (int p = 0; b.dx.data && p < P; ++p)
          store(at<S>(b.dx, m + p, k), V(dz[p]) * load(at<S>(b.w, 0, k), lanes), lanes);
        if (!dw) return;
        V sum;
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) sum = sum + V(dz[p]) * load(at<S>(b.x, m + p, k), lanes);
        store(dw_piece + k, load(dw_piece + k, lanes) + sum, lanes);
      });
    });
    if (dw) add_up(dw_total, dw_piece, b.K);
    db_total += db_piece;
  });
  if (dw) round_sums(dw_total, b.K, dw);
  if (db) *db = static_cast<T>(db_total);
}

}  // namespace
}  // namespace mlp_ext::cpu
