// Access to matrices, and packing for gemm-inl.h.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/gemm-inl.h"
#include "cpu/simd/vec-inl.h"

namespace mlp_ext::cpu {
namespace {

// Pointer to element (i, j).
template <class S>
inline const S* at(const ConstMatrix& m, int64_t i, int64_t j) {
  return static_cast<const S*>(m.data) + i * m.stride + j;
}
template <class S>
inline S* at(const Matrix& m, int64_t i, int64_t j) {
  return static_cast<S*>(m.data) + i * m.stride + j;
}

// Calls f(j, lanes) for every vector of n elements; lanes is AllLanes for all but the last.
template <class T, class F>
inline void for_vectors(int64_t n, const F& f) {
  int64_t j = 0;
  for (; j + Vec<T>::lanes <= n; j += Vec<T>::lanes) f(j, AllLanes{});
  if (j < n) f(j, static_cast<int>(n - j));
}

template <class S>
Accumulator<S> scalar(const S* p) {
  if constexpr (std::is_same_v<S, Accumulator<S>>)
    return *p;
  else
    return load(p, 1).v[0];
}

template <class T>
inline T sum_lanes(Vec<T> v) {
  T total = 0;
  for (int i = 0; i < Vec<T>::lanes; ++i) total += v.v[i];
  return total;
}

template <class T>
inline int64_t round_up_columns(int64_t columns) {
  return (columns + Tile<T>::columns - 1) / Tile<T>::columns * Tile<T>::columns;
}

// Packs rows k0.. of B as panels [depth, Tile::columns].
template <class S, class T>
inline void pack_panels(const ConstMatrix& m, int64_t k0, int64_t depth, int64_t j0, int64_t columns, T* packed) {
  for (int64_t j = 0; j < columns; j += Tile<T>::columns)
    for (int64_t k = 0; k < depth; ++k, packed += Tile<T>::columns)
      for (int v = 0; v < Tile<T>::vectors; ++v) {
        const int64_t column = j + v * Vec<T>::lanes;
        const auto n = std::clamp<int64_t>(columns - column, 0, Vec<T>::lanes);
        store(packed + v * Vec<T>::lanes, n ? load(at<S>(m, k0 + k, j0 + column), static_cast<int>(n)) : Vec<T>());
      }
}

// The same for B = W^T: column j of B is row j of W.
template <class S, class T>
inline void pack_panels_transposed(const ConstMatrix& w, int64_t k0, int64_t depth, int64_t j0, int64_t columns,
                                   T* packed) {
  constexpr int width = Tile<T>::columns, lanes = Vec<T>::lanes;
  for (int64_t j = 0; j < columns; j += width, packed += depth * width)
    for (int64_t c = 0; c < width; c += lanes)
      for_vectors<T>(depth, [&](int64_t k, auto n) {
        Vec<T> square[lanes];
        const int64_t rows = std::clamp<int64_t>(columns - j - c, 0, lanes);
        for (int64_t i = 0; i < rows; ++i) square[i] = load(at<S>(w, j0 + j + c + i, k0 + k), n);
        transpose(square);
        const int64_t filled = std::min<int64_t>(lanes, depth - k);
        for (int64_t i = 0; i < filled; ++i) store(packed + (k + i) * width + c, square[i]);
      });
}

#if MLP_EXT_VECTOR_BYTES == 64
// The same for pairs of bfloat16: k counts pairs, `end` is the number of rows of B (of columns of W).

inline Vec<float> pairs(U32 low, U32 high) { return Vec<float>(bit_cast<Vec<float>::Native>(low | (high << 16))); }

// Rounds two vectors and interleaves them.
inline Vec<float> pairs(Vec<float> low, Vec<float> high) {
  return pairs(__builtin_convertvector(bit_cast<U16>(_mm512_cvtneps_pbh((__m512)low.v)), U32),
               __builtin_convertvector(bit_cast<U16>(_mm512_cvtneps_pbh((__m512)high.v)), U32));
}

inline U32 load_bits(const BFloat16* p, int n) {
  return __builtin_convertvector(bit_cast<U16>(_mm256_maskz_loadu_epi16(first_lanes(n), p)), U32);
}

inline void pack_panels_of_pairs(const ConstMatrix& m, int64_t k0, int64_t depth, int64_t end, int64_t j0,
                                 int64_t columns, float* packed) {
  for (int64_t j = 0; j < columns; j += Tile<float>::columns)
    for (int64_t k = k0; k < k0 + depth; ++k, packed += Tile<float>::columns)
      for (int v = 0; v < Tile<float>::vectors; ++v) {
        const int64_t column = j + v * kLanes;
        const int n = static_cast<int>(std::clamp<int64_t>(columns - column, 0, kLanes));
        U32 low{}, high{};
        if (n > 0) low = load_bits(at<BFloat16>(m, 2 * k, j0 + column), n);
        if (n > 0 && 2 * k + 1 < end) high = load_bits(at<BFloat16>(m, 2 * k + 1, j0 + column), n);
        store(packed + v * kLanes, pairs(low, high));
      }
}

inline void pack_panels_of_pairs_transposed(const ConstMatrix& w, int64_t k0, int64_t depth, int64_t end, int64_t j0,
                                            int64_t columns, float* packed) {
  constexpr int width = Tile<float>::columns;
  for (int64_t j = 0; j < columns; j += width, packed += depth * width)
    for (int64_t c = 0; c < width; c += kLanes)
      for (int64_t k = 0; k < depth; k += kLanes) {
        Vec<float> square[kLanes];
        const int64_t rows = std::clamp<int64_t>(columns - j - c, 0, kLanes);
        const int n = static_cast<int>(std::min<int64_t>(2 * kLanes, end - 2 * (k0 + k)));
        for (int64_t i = 0; i < rows; ++i)
          square[i] = Bfloat16Pair::read(at<BFloat16>(w, j0 + j + c + i, 2 * (k0 + k)), n);
        transpose(square);
        for (int64_t i = 0; i < std::min<int64_t>(kLanes, depth - k); ++i)
          store(packed + (k + i) * width + c, square[i]);
      }
}
#endif

}  // namespace
}  // namespace mlp_ext::cpu
