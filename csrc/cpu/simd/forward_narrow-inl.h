// Forward for K = 1, or few inputs and outputs: several rows of y share a vector, so that its lanes are full. Only W is
// packed. z stays in L1 until the activation is applied.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/epilogue-inl.h"
#include "cpu/simd/pack-inl.h"
#include "cpu/simd/row_sums-inl.h"
#include "cpu/simd/vec-inl.h"

namespace mlp_ext::cpu {
namespace {

// Rows of a matrix, contiguous.
template <class S, class T>
void read_rows(const ConstMatrix& from, int64_t begin, int64_t rows, int64_t columns, T* to) {
  if (from.stride == columns)
    return for_vectors<T>(rows * columns, [&](int64_t i, auto n) { store(to + i, load(at<S>(from, begin, i), n), n); });
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) to[r * columns + c] = scalar(at<S>(from, begin + r, c));
}

// Where the row of a lane begins in rows of `width` elements, if each row has `columns` lanes. Lanes after P rows
// repeat the last row.
template <class T>
auto row_of_lane(int64_t columns, int64_t P, int64_t width) {
  typename Vec<T>::Bits begin{};
  for (int64_t l = 0; l < Vec<T>::lanes; ++l) begin[l] = static_cast<int>(std::min(l / columns, P - 1) * width);
  return begin;
}

constexpr bool kShuffles = kVectorBytes >= 32;  // by lanes that are not known at compile time

template <class S>
struct Narrow {
  using T = Accumulator<S>;
  using V = Vec<T>;
  static constexpr int64_t lanes = V::lanes;
  static constexpr int64_t kBlock = 4096;  // elements of x and of z at a time: four rows of 1000; half if P > 1
  static constexpr int kUnroll = 4;        // vectors of z that share a vector of W
  static constexpr int64_t kTail = 3 * kUnroll * lanes;       // behind a block: the last vectors are whole
  static constexpr int64_t kMost = kNarrowBytes / sizeof(T);  // K and N, unless K = 1
  static constexpr int64_t kScratch = (kMost + 2) * std::max(kBlock, lanes) + 2 * (kBlock + kTail);

  const Forward& f;
  int64_t first, N;  // columns of y
  int64_t P;         // rows of y in a vector
  T *w, *bias;       // [K, width] and [width] for the N columns, P times side by side
  T *x, *z;          // of a block of rows, contiguous

  static void run(const Forward& f, Range rows, Range columns, void* scratch) {
    for (int64_t n = columns.begin; n < columns.end; n += kBlock)
      part(f, rows, {n, std::min(n + kBlock, columns.end)}, static_cast<T*>(scratch));
    end_of_streams();
  }

 private:
  static void part(const Forward& f, Range rows, Range columns, T* scratch) {
    const int64_t N = columns.size(), width = std::max(N, lanes);
    const int64_t P = kShuffles ? std::max<int64_t>(1, std::min(lanes / N, 2 * lanes / f.K)) : 1;
    T *const bias = scratch + f.K * width, *const x = bias + width, *const z = x + kBlock + kTail;
    const Narrow self{f, columns.begin, N, P, scratch, bias, x, z};
    self.pack();
    const int64_t step = std::max<int64_t>(1, (P > 1 ? kBlock / 2 : kBlock) / std::max(N, f.K));
    for (int64_t m = rows.begin; m < rows.end; m += step) {
      const int64_t count = std::min(step, rows.end - m);
      read_rows<S>(f.x, m, count, f.K, x);
      P > 1 ? self.rows_side_by_side(count) : self.row_by_row(count);
      self.finish(m, count);
    }
  }

  void pack() const {
    const int64_t width = std::max(N, lanes);
    std::fill(w, bias + width, T(0));
    if (f.K == 1 && f.w.stride == 1)
      for_vectors<T>(N, [&](int64_t n, auto count) { store(w + n, load(at<S>(f.w, 0, first + n), count), count); });
    else
      for (int64_t n = 0; n < N; ++n)
        for (int64_t k = 0; k < f.K; ++k) w[k * width + n] = scalar(at<S>(f.w, first + n, k));
    const S* const b = static_cast<const S*>(f.bias) + first;
    if (f.bias) for_vectors<T>(N, [&](int64_t n, auto count) { store(bias + n, load(b + n, count), count); });
    for (T* row = w; P > 1 && row <= bias; row += width)
      for (int64_t n = N; n < P * N; ++n) row[n] = row[n - N];
  }

  void rows_side_by_side(int64_t count) const {
    const auto row = row_of_lane<T>(N, P, f.K);
    const V of_bias = load(bias);
    for (int64_t r = 0; r < count; r += kUnroll * P) {
      V sum[kUnroll], low[kUnroll], high[kUnroll];
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) {
        const T* const from = x + (r + u * P) * f.K;
        low[u] = load(from);
        high[u] = load(from + lanes);
        sum[u] = of_bias;
      }
      auto index = row;
      for (int64_t k = 0; k < f.K; ++k, index = index + 1) {
        const V wk = load(w + k * lanes);
#pragma GCC unroll 4
        for (int u = 0; u < kUnroll; ++u) sum[u] = sum[u] + V(shuffle(low[u].v, high[u].v, index)) * wk;
      }
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) store(z + (r + u * P) * N, sum[u]);  // the next one overwrites empty lanes
    }
  }

  void row_by_row(int64_t count) const {
    const int64_t width = std::max(N, lanes);
    for_rows({0, count}, [&](auto rows, int64_t r) {
      constexpr int R = decltype(rows)::value;
      for_vectors<T>(N, [&](int64_t n, auto some) {
        V sum[R];
        for (int p = 0; p < R; ++p) sum[p] = load(bias + n, some);
        for (int64_t k = 0; k < f.K; ++k) {
          const V wk = load(w + k * width + n, some);
#pragma GCC unroll 4
          for (int p = 0; p < R; ++p) sum[p] = sum[p] + V(x[(r + p) * f.K + k]) * wk;
        }
#pragma GCC unroll 4
        for (int p = 0; p < R; ++p) store(z + (r + p) * N + n, sum[p], some);
      });
    });
  }

  // y = act(z), and z
  void finish(int64_t m, int64_t count) const {
    const bool one_row = f.y.stride == N;  // the block of y is contiguous
    const int64_t rows = one_row ? 1 : count, size = one_row ? count * N : N;
    S* const y = at<S>(f.y, m, first);
    if (f.z.data)
      for (int64_t r = 0; r < count; ++r)
        for_vectors<T>(
            N, [&](int64_t n, auto some) { store(at<S>(f.z, m + r, first + n), load(z + r * N + n, some), some); });
    const auto act = [&](int64_t from, int64_t to, bool past_caches) {
      pointwise_of<S>().act(*f.activation, {z + from, N}, {y + from, f.y.stride}, rows, to - from, past_caches);
    };
    if (!one_row || !f.y_past_caches) return act(0, size, false);
    constexpr auto line = static_cast<int64_t>(lanes * sizeof(S));  // aligned vectors may bypass the caches
    const int64_t past = reinterpret_cast<uintptr_t>(y) % line;
    const int64_t head = std::min(size, past ? (line - past) / static_cast<int64_t>(sizeof(S)) : 0);
    act(0, head, false);
    act(head, size, true);
  }
};

}  // namespace
}  // namespace mlp_ext::cpu
