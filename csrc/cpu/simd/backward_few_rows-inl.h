// Backward for few rows, bound by memory: one pass over W reads it for dx, and writes dW or updates W. Threads split
// the rows of W, so that each reads and writes contiguous memory, and have their own sums of dx. Where W has few rows
// they split its columns.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/epilogue-inl.h"
#include "cpu/simd/pack-inl.h"
#include "cpu/simd/row_sums-inl.h"
#include "cpu/simd/vec-inl.h"

namespace mlp_ext::cpu {
namespace {

template <class S>
struct FewRows {
  using T = Accumulator<S>;
  using V = Vec<T>;
  static constexpr int64_t kRowsOfW = 4;             // at a time
  static constexpr int64_t kColumns = 1024;          // at a time: x, the sums of dx and the next rows of W stay in L1
  static constexpr int64_t kChunk = 2 * kShortRows;  // columns of dz computed at a time
  static constexpr int64_t kStride = kColumns + 5 * V::lanes;  // not a multiple of a page: rows would share L1 sets
  static constexpr int64_t kDouble = sizeof(double) / sizeof(T);
  static constexpr int64_t kScratch = kMostFewRows * (kChunk + (2 + kDouble) * kStride) + kRowsOfW * kStride;

  const Backward& b;
  T* dz;          // [M, kChunk]
  T *x, *sums;    // [M, kColumns]: x, and dx over a chunk
  double* total;  // [M, kColumns]: dx
  T* dw;          // [kRowsOfW, kColumns]
  T* dx;          // [M, K] or nullptr

  // Rows and columns of W. dx: sums over these rows, [M, K], or nullptr to store to b.dx.
  static void run(const Backward& b, Range rows, Range columns, void* dx, void* scratch) {
    T* const dz = static_cast<T*>(scratch);
    T *const sums = dz + b.M * kChunk, *const x = sums + b.M * kStride, *const dw = x + b.M * kStride;
    double* const total = reinterpret_cast<double*>(dw + kRowsOfW * kStride);
    const FewRows self{b, dz, x, sums, total, dw, static_cast<T*>(dx)};
    const int64_t step = b.M > 2 ? kColumns / 2 : kColumns;
    for (int64_t k = columns.begin; k < columns.end; k += step)
      self.block(rows, {k, std::min(k + step, columns.end)}, k == 0);
    end_of_streams();
  }

 private:
  void block(Range rows, Range columns, bool first) const {
    const int64_t size = columns.size(), M = b.M;
    const bool needs_dw = b.dw || b.update_w;
    const auto clear = [&](auto* sums_of_m) {
      for (int64_t m = 0; m < M; ++m) std::fill(sums_of_m + m * kStride, sums_of_m + m * kStride + size, 0);
    };
    for (int64_t m = 0; needs_dw && m < M; ++m)
      for_vectors<T>(size, [&](int64_t k, auto lanes) {
        store(x + m * kStride + k, load(at<S>(b.x, m, columns.begin + k), lanes), lanes);
      });
    clear(total);
    for (int64_t n0 = rows.begin; n0 < rows.end; n0 += kChunk) {
      const Range chunk{n0, std::min(n0 + kChunk, rows.end)};
      grad_z_rows<S>(b, {0, M}, chunk, dz, kChunk);
      if (first) bias(chunk);
      if (!needs_dw && !b.dx.data) continue;  // db alone
      clear(sums);
      for_rows(chunk, [&](auto count, int64_t n) {
        constexpr int R = decltype(count)::value;
        if (!needs_dw)
          rows_of_w<R, true, false>(n, n - n0, columns);
        else if (b.dx.data)
          rows_of_w<R, true, true>(n, n - n0, columns);
        else
          rows_of_w<R, false, true>(n, n - n0, columns);
      });
      for (int64_t m = 0; b.dx.data && m < M; ++m) add_up(total + m * kStride, sums + m * kStride, size);
    }
    for (int64_t m = 0; b.dx.data && m < M; ++m) {
      round_sums(total + m * kStride, size, sums);
      for_vectors<T>(size, [&](int64_t k, auto lanes) {
        const V v = load(sums + k, lanes);
        dx ? store(dx + m * b.K + columns.begin + k, v, lanes) : store(at<S>(b.dx, m, columns.begin + k), v, lanes);
      });
    }
  }

  // dx += dz W and dW = dz^T x for R rows of W
  template <int R, bool needs_dx, bool needs_dw>
  void rows_of_w(int64_t n, int64_t c, Range columns) const {
    const auto each = [&](const auto& put) {
      for_vectors<T>(columns.size(), [&](int64_t k, auto lanes) {
        V w[R], dw_of_rows[R];
#pragma GCC unroll 4
        for (int r = 0; needs_dx && r < R; ++r) {
          const S* const from = at<S>(b.w, n + r, columns.begin + k);
          w[r] = load(from, lanes);
          __builtin_prefetch(from + R * b.w.stride);  // the next rows; it may lie past the end
        }
        for (int64_t m = 0; m < b.M; ++m) {
          V xm, sum;
          if constexpr (needs_dw) xm = load(x + m * kStride + k, lanes);
          if constexpr (needs_dx) sum = load(sums + m * kStride + k, lanes);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            const V v = dz[m * kChunk + c + r];
            if constexpr (needs_dw) dw_of_rows[r] = dw_of_rows[r] + v * xm;
            if constexpr (needs_dx) sum = sum + v * w[r];
          }
          if constexpr (needs_dx) store(sums + m * kStride + k, sum, lanes);
        }
#pragma GCC unroll 4
        for (int r = 0; needs_dw && r < R; ++r) put(r, k, dw_of_rows[r], lanes);
      });
    };
    const int64_t begin = n * b.K + columns.begin;
    if (b.update_w) {
      each([&](int r, int64_t k, V v, auto lanes) { store(dw + r * kStride + k, v, lanes); });
      pointwise_of<S>().update(*b.update_w, begin, b.K, {dw, kStride}, R, columns.size());
    } else {
      const bool past_caches = b.dw_past_caches;
      S* const out = static_cast<S*>(b.dw) + begin;
      each([&](int r, int64_t k, V v, auto lanes) { store_result(out + r * b.K + k, v, lanes, past_caches); });
    }
  }

  // db = sum over rows of dz
  void bias(Range chunk) const {
    if (!b.db && !b.update_b) return;
    alignas(kVectorBytes) T db[kChunk];
    for_vectors<T>(chunk.size(), [&](int64_t n, auto lanes) {
      V sum;
      for (int64_t m = 0; m < b.M; ++m) sum = sum + load(dz + m * kChunk + n, lanes);
      store(db + n, sum, lanes);
      if (b.db) store(static_cast<S*>(b.db) + chunk.begin + n, sum, lanes);
    });
    if (b.update_b) pointwise_of<S>().update(*b.update_b, chunk.begin, 0, {db, 0}, 1, chunk.size());
  }
};

}  // namespace
}  // namespace mlp_ext::cpu
