// Backward for K = 1 or N = 1: dx, dW and db in one pass over the rows. dz is computed a few rows at a time.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/epilogue-inl.h"
#include "cpu/simd/pack-inl.h"
#include "cpu/simd/row_sums-inl.h"
#include "cpu/simd/vec-inl.h"

namespace mlp_ext::cpu {
namespace {

constexpr int64_t kGradZInL1 = 1024;  // elements of dz computed at a time

// K = 1: lanes run along N. scratch: [2, N] of double, [7, N] and kGradZInL1 of T.
template <class S, class T = Accumulator<S>>
void backward_k1(const Backward& b, Range samples, void* dw, void* db, void* scratch) {
  using V = Vec<T>;
  double *const dw_total = static_cast<double*>(scratch), *const db_total = dw_total + b.N;  // [N] each
  T *const w = reinterpret_cast<T*>(db_total + b.N), *const dw_piece = w + b.N, *const db_piece = dw_piece + b.N,
           *const dz = db_piece + b.N;
  const int64_t rows_of_dz = std::max<int64_t>(4, kGradZInL1 / b.N / 4 * 4);
  std::fill(dw_total, db_total + b.N, 0.0);
  for (int64_t n = 0; n < b.N; ++n) w[n] = b.dx.data ? scalar(at<S>(b.w, n, 0)) : T(0);
  for_row_chunks(samples, [&](Range piece) {
    std::fill(dw_piece, db_piece + b.N, T(0));
    const auto add_rows = [&](Range rows) {
      grad_z_rows<S>(b, rows, {0, b.N}, dz, b.N);
      for_rows(rows, [&](auto count, int64_t m) {
        constexpr int P = decltype(count)::value;
        const T* const dz_of_rows = dz + (m - rows.begin) * b.N;
        V dx[P], x[P];
        for (int p = 0; dw && p < P; ++p) x[p] = scalar(at<S>(b.x, m + p, 0));
        for_vectors<T>(b.N, [&](int64_t n, auto lanes) {
          const V wn = load(w + n, lanes);
          V dw_sum, db_sum;
#pragma GCC unroll 4
          for (int p = 0; p < P; ++p) {
            const V v = load(dz_of_rows + p * b.N + n, lanes);
            dx[p] = dx[p] + v * wn;
            dw_sum = dw_sum + v * x[p];
            db_sum = db_sum + v;
          }
          store(dw_piece + n, load(dw_piece + n, lanes) + dw_sum, lanes);
          store(db_piece + n, load(db_piece + n, lanes) + db_sum, lanes);
        });
        for (int p = 0; b.dx.data && p < P; ++p) store(at<S>(b.dx, m + p, 0), V(sum_lanes(dx[p])), 1);
      });
    };
    for (int64_t m = piece.begin; m < piece.end; m += rows_of_dz) add_rows({m, std::min(m + rows_of_dz, piece.end)});
    add_up(dw_total, dw_piece, b.N);
    add_up(db_total, db_piece, b.N);
  });
  if (dw) round_sums(dw_total, b.N, static_cast<T*>(dw));
  if (db) round_sums(db_total, b.N, static_cast<T*>(db));
}

// dz of a single column, up to kShortRows rows. Contiguous columns are processed as one row, in full vectors.
template <class S, class T = Accumulator<S>>
void grad_z_column(const Backward& b, Range rows, T* dz) {
  const bool no_gaps = b.dy.stride == 1 && (!b.saved.data || b.saved.stride == 1);
  pointwise_of<S>().grad_z(*b.activation, {at<S>(b.dy, rows.begin, 0), b.dy.stride},
                           {b.saved.data ? at<S>(b.saved, rows.begin, 0) : nullptr, b.saved.stride}, {dz, 1}, nullptr,
                           no_gaps ? 1 : rows.size(), no_gaps ? rows.size() : 1);
}

// K = N = 1, x and dx contiguous: lanes run along the rows.
template <class S, class T = Accumulator<S>>
void backward_k1_n1(const Backward& b, Range samples, void* dw, void* db) {
  using V = Vec<T>;
  const V w = b.dx.data ? scalar(at<S>(b.w, 0, 0)) : T(0);
  double dw_total = 0, db_total = 0;
  T dz[kShortRows];
  for_row_chunks(samples, [&](Range piece) {
    grad_z_column<S>(b, piece, dz);
    V dw_sums, db_sums;
    for_vectors<T>(piece.size(), [&](int64_t i, auto lanes) {
      const int64_t m = piece.begin + i;
      const V v = load(dz + i, lanes);
      db_sums = db_sums + v;
      if (dw) dw_sums = dw_sums + v * load(at<S>(b.x, 0, m), lanes);
      if (b.dx.data) store(at<S>(b.dx, 0, m), v * w, lanes);
    });
    dw_total += sum_lanes(dw_sums);
    db_total += sum_lanes(db_sums);
  });
  if (dw) *static_cast<T*>(dw) = static_cast<T>(dw_total);
  if (db) *static_cast<T*>(db) = static_cast<T>(db_total);
}

// N = 1: lanes run along K. scratch: [K] of double, [K] of T.
template <class S, class T = Accumulator<S>>
void backward_n1(const Backward& b, Range samples, void* dw, void* db, void* scratch) {
  using V = Vec<T>;
  if (b.K == 1 && (!b.x.data || b.x.stride == 1)) return backward_k1_n1<S>(b, samples, dw, db);
  double* const dw_total = static_cast<double*>(scratch);
  T* const dw_piece = reinterpret_cast<T*>(dw_total + b.K);
  std::fill(dw_total, dw_total + b.K, 0.0);
  double db_total = 0;
  T dz[kShortRows];
  for_row_chunks(samples, [&](Range piece) {
    grad_z_column<S>(b, piece, dz);
    T db_piece = 0;
    if (dw) std::fill(dw_piece, dw_piece + b.K, T(0));
    for_rows(piece, [&](auto count, int64_t m) {
      constexpr int P = decltype(count)::value;
      const T* const v = dz + (m - piece.begin);
      T db_rows = 0;
      for (int p = 0; p < P; ++p) db_rows += v[p];
      db_piece += db_rows;
      for_vectors<T>(b.dx.data || dw ? b.K : 0, [&](int64_t k, auto lanes) {
        for (int p = 0; b.dx.data && p < P; ++p)
          store(at<S>(b.dx, m + p, k), V(v[p]) * load(at<S>(b.w, 0, k), lanes), lanes);
        if (!dw) return;
        V sum;
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) sum = sum + V(v[p]) * load(at<S>(b.x, m + p, k), lanes);
        store(dw_piece + k, load(dw_piece + k, lanes) + sum, lanes);
      });
    });
    if (dw) add_up(dw_total, dw_piece, b.K);
    db_total += db_piece;
  });
  if (dw) round_sums(dw_total, b.K, static_cast<T*>(dw));
  if (db) *static_cast<T*>(db) = static_cast<T>(db_total);
}

}  // namespace
}  // namespace mlp_ext::cpu
