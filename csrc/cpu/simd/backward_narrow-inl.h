// Backward for few inputs and outputs: several rows of x, dz and dx share a vector. dx, dW and db in one pass over
// blocks of rows in L1.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/epilogue-inl.h"
#include "cpu/simd/forward_narrow-inl.h"
#include "cpu/simd/pack-inl.h"
#include "cpu/simd/row_sums-inl.h"
#include "cpu/simd/vec-inl.h"

namespace mlp_ext::cpu {
namespace {

template <class S>
struct NarrowBackward {
  using T = Accumulator<S>;
  using V = Vec<T>;
  static constexpr int64_t lanes = V::lanes;
  static constexpr int64_t kBlock = kShortRows * lanes;  // elements of x and of dz at a time: short sums in each lane
  static constexpr int64_t kTail = Narrow<S>::kTail;
  static constexpr int kUnroll = Narrow<S>::kUnroll;
  static constexpr int64_t kMost = Narrow<S>::kMost;  // K and N
  static constexpr int64_t kScratch = 2 * kMost * lanes + 3 * (kBlock + kTail);

  static bool takes(const Backward& b) { return kShuffles && b.K <= lanes && b.N <= 2 * lanes; }

  const Backward& b;
  int64_t P;       // rows of x in a vector
  T *w, *dw;       // [N, lanes]: W and sums of dW, P times side by side
  T *x, *dz, *dx;  // of a block of rows, contiguous

  static void run(const Backward& b, Range samples, void* dw, void* db, void* scratch) {
    T* const w = static_cast<T*>(scratch);
    T *const sums = w + kMost * lanes, *const x = sums + kMost * lanes, *const dz = x + kBlock + kTail;
    const NarrowBackward self{b, std::min(lanes / b.K, 2 * lanes / b.N), w, sums, x, dz, dz + kBlock + kTail};
    std::fill(w, dz, T(0));
    for (int64_t n = 0; b.dx.data && n < b.N; ++n)
      for (int64_t l = 0; l < self.P * b.K; ++l) w[n * lanes + l] = scalar(at<S>(b.w, n, l % b.K));
    double dw_total[kMost * kMost] = {}, db_total[kMost] = {};
    const int64_t step = kBlock / std::max(b.K, b.N);
    for (int64_t m = samples.begin; m < samples.end; m += step) {
      const int64_t count = std::min(step, samples.end - m);
      self.read(m, count, dw);
      self.rows(count);
      if (dw)
        for (int64_t n = 0; n < b.N; ++n) add_lanes(sums + n * lanes, self.P * b.K, b.K, dw_total + n * b.K);
      if (db) self.add_bias(count, db_total);
      if (b.dx.data) self.write(m, count);
    }
    if (dw) round_sums(dw_total, b.N * b.K, static_cast<T*>(dw));
    if (db) round_sums(db_total, b.N, static_cast<T*>(db));
    end_of_streams();
  }

 private:
  // total[i % period] += v[i]
  static void add_lanes(const T* v, int64_t size, int64_t period, double* total) {
    for (int64_t begin = 0; begin < size; begin += period) add_up(total, v + begin, period);
  }

  // x and dz of a block, and zeros after its end
  void read(int64_t m, int64_t count, bool needs_x) const {
    const bool one_row = b.dy.stride == b.N && (!b.saved.data || b.saved.stride == b.N);
    const ConstMatrix saved{b.saved.data ? at<S>(b.saved, m, 0) : nullptr, b.saved.stride};
    pointwise_of<S>().grad_z(*b.activation, {at<S>(b.dy, m, 0), b.dy.stride}, saved, {dz, b.N}, nullptr,
                             one_row ? 1 : count, one_row ? count * b.N : b.N);
    if (needs_x) read_rows<S>(b.x, m, count, b.K, x);
    std::fill_n(dz + count * b.N, kTail, T(0));
    std::fill_n(x + count * b.K, kTail, T(0));
  }

  // dx = dz W and dW = dz^T x
  void rows(int64_t count) const {
    std::fill_n(dw, b.N * lanes, T(0));
    const auto row = row_of_lane<T>(b.K, P, b.N);
    for (int64_t r = 0; r < count; r += kUnroll * P) {
      V low[kUnroll], high[kUnroll], xs[kUnroll], sum[kUnroll];
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) {
        const T* const from = dz + (r + u * P) * b.N;
        low[u] = load(from);
        high[u] = load(from + lanes);
        xs[u] = load(x + (r + u * P) * b.K);
      }
      auto index = row;
      for (int64_t n = 0; n < b.N; ++n, index = index + 1) {
        const V wn = load(w + n * lanes);
        V of_n;
#pragma GCC unroll 4
        for (int u = 0; u < kUnroll; ++u) {
          const V v(shuffle(low[u].v, high[u].v, index));
          of_n = of_n + v * xs[u];
          sum[u] = sum[u] + v * wn;
        }
        store(dw + n * lanes, load(dw + n * lanes) + of_n);
      }
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) store(dx + (r + u * P) * b.K, sum[u]);
    }
  }

  void add_bias(int64_t count, double* total) const {
    alignas(kVectorBytes) T sums[2 * lanes];
    const int64_t period = b.N > lanes ? 2 * lanes : lanes, step = period / b.N * b.N;
    for (int64_t first = 0; first < step; first += lanes) {
      V sum;
      for (int64_t i = first; i < count * b.N; i += 4 * step) {  // four at a time: a shorter sum
        const T* const v = dz + i;
        sum = sum + ((load(v) + load(v + step)) + (load(v + 2 * step) + load(v + 3 * step)));
      }
      store(sums + first, sum);
    }
    add_lanes(sums, step, b.N, total);
  }

  void write(int64_t m, int64_t count) const {
    const bool one_row = b.dx.stride == b.K, past_caches = b.dx_past_caches;
    for (int64_t r = 0; r < (one_row ? 1 : count); ++r)
      for_vectors<T>(one_row ? count * b.K : b.K, [&](int64_t k, auto some) {
        store_result(at<S>(b.dx, m + r, k), load(dx + r * b.K + k, some), some, past_caches);
      });
  }
};

}  // namespace
}  // namespace mlp_ext::cpu
