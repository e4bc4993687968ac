// C = A B^T for few rows of A or of B: lanes run along the depth, nothing is packed.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/gemm-inl.h"
#include "cpu/simd/pack-inl.h"
#include "cpu/simd/vec-inl.h"

namespace mlp_ext::cpu {
namespace {

struct Sizes {
  int64_t M, K, N;
};

// Calls f(k, lanes) for every vector of Elements in a range of the depth.
template <class Element, class T, class F>
inline void for_depth(Range depth, const F& f) {
  constexpr int64_t step = Element::depth * Vec<T>::lanes;
  int64_t k = depth.begin;
  for (; k + step <= depth.end; k += step) f(k, AllLanes{});
  if (k < depth.end) f(k, static_cast<int>(depth.end - k));
}

// Calls f(range), which adds to sums, for chunks of the depth, so that no lane adds up many terms one by one. The sums
// of earlier chunks are kept in memory: the registers are full.
constexpr int64_t kShortDepth = 256;  // vectors of a chunk
template <class T, int count, class F>
MLP_EXT_INLINE void in_chunks(int64_t depth, int64_t chunk, Vec<T> (&sums)[count], const F& f) {
  alignas(kVectorBytes) T earlier[count * Vec<T>::lanes];
  for (int64_t k = 0;; k += chunk) {
    f(Range{k, std::min(k + chunk, depth)});
    if (k > 0)
#pragma GCC unroll 16
      for (int i = 0; i < count; ++i) sums[i] = sums[i] + load(earlier + i * Vec<T>::lanes);
    if (k + chunk >= depth) return;
#pragma GCC unroll 16
    for (int i = 0; i < count; ++i) {
      store(earlier + i * Vec<T>::lanes, sums[i]);
      sums[i] = Vec<T>();
    }
  }
}

// One row of A against Q rows of B at a time. Q is small: for a single row of B, or rows that alias in L1.
template <int Q, class S, class Element, class Finish>
void dots_of_one_row(const ConstMatrix& a, const ConstMatrix& b, int64_t depth, Range columns, const Finish finish) {
  using T = Accumulator<S>;
  using V = Vec<T>;
  constexpr int chains = 4;
  constexpr int64_t step = Element::depth * V::lanes;
  for (int64_t n = columns.begin; n < columns.end; n += Q) {
    const S *const x = at<S>(a, 0, 0), *w[Q];  // past the edge: the last row again
    for (int q = 0; q < Q; ++q) w[q] = at<S>(b, std::min<int64_t>(n + q, columns.end - 1), 0);
    V sums[chains * Q];
    const auto add = [&](int chain, int64_t k, auto lanes) {
      const V xk = Element::read(x + k, lanes);
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q)
        sums[chain * Q + q] = Element::accumulate(sums[chain * Q + q], xk, Element::read(w[q] + k, lanes));
    };
    in_chunks<T>(depth, chains * kShortDepth * step, sums, [&](Range chunk) {
      int64_t k = chunk.begin;
      for (; k + chains * step <= chunk.end; k += chains * step)
#pragma GCC unroll 4
        for (int chain = 0; chain < chains; ++chain) add(chain, k + chain * step, AllLanes{});
      for_depth<Element, T>({k, chunk.end}, [&](int64_t j, auto lanes) { add(0, j, lanes); });
    });
    for (int q = 0; q < Q && n + q < columns.end; ++q)
      finish(0, n + q, V(sum_lanes((sums[q] + sums[Q + q]) + (sums[2 * Q + q] + sums[3 * Q + q]))), 1);
  }
}

// Tiles of P rows of A and Q rows of B. A transpose reduces the P Q vectors of partial sums to one vector of results.
template <int P, int Q, class S, class Element, class Finish>
void dots_of_tiles(const ConstMatrix& a, const ConstMatrix& b, int64_t depth, Range rows, Range columns,
                   const Finish finish) {
  using T = Accumulator<S>;
  using V = Vec<T>;
  static_assert(P * Q == V::lanes);
  for (int64_t n = columns.begin; n < columns.end; n += Q)
    for (int64_t m = rows.begin; m < rows.end; m += P) {
      if (Q == 1 && depth == 1 && a.stride == 1) {  // an elementwise product
        const int n_lanes = static_cast<int>(std::min<int64_t>(P, rows.end - m));
        finish.column(m, load(at<S>(a, m, 0), n_lanes) * V(load(at<S>(b, 0, 0), 1).v[0]), n_lanes);
        continue;
      }
      const S *x[P], *w[Q];  // past the edge: the last row again
      for (int p = 0; p < P; ++p) x[p] = at<S>(a, std::min<int64_t>(m + p, rows.end - 1), 0);
      for (int q = 0; q < Q; ++q) w[q] = at<S>(b, std::min<int64_t>(n + q, columns.end - 1), 0);
      V acc[V::lanes];
      in_chunks<T>(depth, kShortDepth * Element::depth * V::lanes, acc, [&](Range chunk) {
        for_depth<Element, T>(chunk, [&](int64_t k, auto lanes) {
          V wk[Q];
#pragma GCC unroll 16
          for (int q = 0; q < Q; ++q) wk[q] = Element::read(w[q] + k, lanes);
#pragma GCC unroll 16
          for (int p = 0; p < P; ++p) {
            const V xk = Element::read(x[p] + k, lanes);
#pragma GCC unroll 16
            for (int q = 0; q < Q; ++q) acc[p * Q + q] = Element::accumulate(acc[p * Q + q], xk, wk[q]);
          }
        });
      });
      transpose(acc);
      V z = acc[0];
#pragma GCC unroll 16
      for (int i = 1; i < V::lanes; ++i) z = z + acc[i];
      if (Q == 1) {  // the results of P rows are contiguous
        finish.column(m, z, static_cast<int>(std::min<int64_t>(P, rows.end - m)));
        continue;
      }
      const int count = static_cast<int>(std::min<int64_t>(Q, columns.end - n));
      alignas(kVectorBytes) T z_rows[V::lanes];
      store(z_rows, z);
      for (int p = 0; p < P && m + p < rows.end; ++p) finish(m + p, n, load(z_rows + p * Q, count), count);
    }
}

// C[rows, columns] = A B^T for A [M, K] and B [N, K].
//   finish(i, j, vector, lanes)      stores C from (i, j) along row i
//   finish.column(i, vector, lanes)  stores C from row i on, where N = 1
template <class S, class Element, class Finish>
void dots(const ConstMatrix& a, const ConstMatrix& b, Sizes size, Range rows, Range columns, const Finish& finish) {
  constexpr int lanes = Vec<Accumulator<S>>::lanes, side = lanes >= 16 ? 4 : 2;
  if (size.M == 1 && size.N == 1)
    dots_of_one_row<1, S, Element>(a, b, size.K, columns, finish);
  else if (size.M == 1 && b.stride * sizeof(S) % kPageBytes == 0)
    dots_of_one_row<4, S, Element>(a, b, size.K, columns, finish);
  else if (size.N == 1)
    dots_of_tiles<lanes, 1, S, Element>(a, b, size.K, rows, columns, finish);
  else if (size.M == 1)
    dots_of_tiles<1, lanes, S, Element>(a, b, size.K, rows, columns, finish);
  else  // as square as the lanes allow
    dots_of_tiles<lanes / side, side, S, Element>(a, b, size.K, rows, columns, finish);
}

}  // namespace
}  // namespace mlp_ext::cpu
