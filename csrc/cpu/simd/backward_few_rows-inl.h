// Backward for few rows, bound by memory: one pass over the rows of W reads them for dx, and writes dW or updates W.
// Each thread takes a range of columns, so that there are no sums to add across threads.
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
  static constexpr int64_t kColumns = 512;           // at a time: x and the sums of dx stay in L1 or L2
  static constexpr int64_t kChunk = 2 * kShortRows;  // columns of dz computed at a time
  static constexpr int64_t kScratch = kMostFewRows * (kChunk + 3 * kColumns) + kRowsOfW * kColumns;

  const Backward& b;
  T* dz;                // [M, kChunk]
  T *x, *sums, *total;  // [M, kColumns]: x, and dx over a chunk and over all
  T* dw;                // [kRowsOfW, kColumns]

  static void run(const Backward& b, Range columns, void* scratch) {
    T* const dz = static_cast<T*>(scratch);
    T *const x = dz + b.M * kChunk, *const sums = x + b.M * kColumns, *const total = sums + b.M * kColumns;
    const FewRows self{b, dz, x, sums, total, total + b.M * kColumns};
    for (int64_t k = columns.begin; k < columns.end; k += kColumns)
      self.block({k, std::min(k + kColumns, columns.end)}, k == 0);
    end_of_streams();
  }

 private:
  bool needs_dw() const { return b.dw || b.update_w; }

  void block(Range columns, bool first) const {
    const int64_t size = columns.size(), M = b.M;
    for (int64_t m = 0; m < M; ++m) {
      if (needs_dw())
        for_vectors<T>(size, [&](int64_t k, auto lanes) {
          store(x + m * kColumns + k, load(at<S>(b.x, m, columns.begin + k), lanes), lanes);
        });
      std::fill(total + m * kColumns, total + m * kColumns + size, T(0));
    }
    for (int64_t n0 = 0; n0 < b.N; n0 += kChunk) {
      const Range chunk{n0, std::min(n0 + kChunk, b.N)};
      grad_z_rows<S>(b, {0, M}, chunk, dz, kChunk);
      if (first) bias(chunk);
      for (int64_t m = 0; m < M; ++m) std::fill(sums + m * kColumns, sums + m * kColumns + size, T(0));
      for_rows(chunk, [&](auto rows, int64_t n) {
        constexpr int R = decltype(rows)::value;
        if (b.dx.data) add_to_dx<R>(n, n - n0, columns);
        if (needs_dw()) put_dw<R>(n, n - n0, columns);
      });
      for (int64_t m = 0; b.dx.data && m < M; ++m)
        for_vectors<T>(size, [&](int64_t k, auto lanes) {
          T* const to = total + m * kColumns + k;
          store(to, load(to, lanes) + load(sums + m * kColumns + k, lanes), lanes);
        });
    }
    for (int64_t m = 0; b.dx.data && m < M; ++m)
      for_vectors<T>(size, [&](int64_t k, auto lanes) {
        store(at<S>(b.dx, m, columns.begin + k), load(total + m * kColumns + k, lanes), lanes);
      });
  }

  // dx += dz W for R rows of W
  template <int R>
  void add_to_dx(int64_t n, int64_t c, Range columns) const {
    for_vectors<T>(columns.size(), [&](int64_t k, auto lanes) {
      V w[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) w[r] = load(at<S>(b.w, n + r, columns.begin + k), lanes);
      for (int64_t m = 0; m < b.M; ++m) {
        V sum = load(sums + m * kColumns + k, lanes);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum = sum + V(dz[m * kChunk + c + r]) * w[r];
        store(sums + m * kColumns + k, sum, lanes);
      }
    });
  }

  // dW = dz^T x for R rows of W
  template <int R>
  void put_dw(int64_t n, int64_t c, Range columns) const {
    const bool past_caches = b.N * b.K * static_cast<int64_t>(sizeof(S)) >= kLargeResult;
    const auto of_rows = [&](const auto& put) {
      for_vectors<T>(columns.size(), [&](int64_t k, auto lanes) {
        V sum[R];
        for (int64_t m = 0; m < b.M; ++m) {
          const V xm = load(x + m * kColumns + k, lanes);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) sum[r] = sum[r] + V(dz[m * kChunk + c + r]) * xm;
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) put(r, k, sum[r], lanes);
      });
    };
    const int64_t begin = n * b.K + columns.begin;
    if (b.update_w) {
      of_rows([&](int r, int64_t k, V v, auto lanes) { store(dw + r * kColumns + k, v, lanes); });
      pointwise_of<S>().update(*b.update_w, begin, b.K, {dw, kColumns}, R, columns.size());
    } else {
      S* const out = static_cast<S*>(b.dw) + begin;
      of_rows([&](int r, int64_t k, V v, auto lanes) { store_result(out + r * b.K + k, v, lanes, past_caches); });
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
