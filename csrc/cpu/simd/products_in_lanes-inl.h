// Products of matrices of vectors: an element has a number for each lane.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/epilogue-inl.h"
#include "cpu/simd/vec-inl.h"

namespace mlp_ext::cpu {
namespace {

// Operands: element (i, k) is at i stride + k depth_stride, and is a number for each lane or the same in all lanes.
// Made from strides in elements; keeps them in bytes, since of others the compiler makes a second loop for strides
// of 1.
template <class T, int64_t bytes>
struct LaneOperand {
  const T* data;
  int64_t stride, depth_stride;
  LaneOperand(const T* data, int64_t stride, int64_t depth_stride)
      : data(data), stride(stride * bytes), depth_stride(depth_stride * bytes) {}
};
template <class T>
struct Each : LaneOperand<T, kVectorBytes> {
  using LaneOperand<T, kVectorBytes>::LaneOperand;
  static Vec<T> read(const T* p) { return load(p); }
};
template <class T>
struct Same : LaneOperand<T, sizeof(T)> {
  using LaneOperand<T, sizeof(T)>::LaneOperand;
  static Vec<T> read(const T* p) { return *p; }
};

// Register blocking: accumulators of up to kMostHeight[columns] x columns, beside a column and an element of the
// operands.
#if defined(__aarch64__)
constexpr bool kHas32Registers = true;
#else
constexpr bool kHas32Registers = kVectorBytes == 64;
#endif
constexpr int kMostWidth = kHas32Registers ? 4 : 3;
constexpr int kMostHeight[] = {0, 8, kHas32Registers ? 8 : 6, kHas32Registers ? 6 : 4, 6};

// A result [rows, columns] or, transposed, [columns, rows] in memory, with a number for each lane.
template <class T, bool is_transposed>
struct Result {
  T* data;
  int64_t stride;  // in numbers for each lane
  Result from(int64_t i, int64_t j) const {
    return {data + (is_transposed ? j * stride + i : i * stride + j) * Vec<T>::lanes, stride};
  }
  T* at(int r, int c) const { return data + (is_transposed ? c * stride + r : r * stride + c) * Vec<T>::lanes; }
};

// Calls f(r, c) for a tile.
template <int R, int C, class F>
MLP_EXT_INLINE void for_tile(const F& f) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) f(r, c);
}

// Epilogues take a tile of sums from (i, j) on.

// z = sums + b, or y = relu(z)
template <class T>
struct AddBias {
  const T* bias;
  Result<T, false> y;
  bool relu;
  template <int R, int C>
  MLP_EXT_INLINE void operator()(int64_t m, int64_t n, Vec<T> (&sums)[R][C]) const {
    const auto to = y.from(m, n);
    const T* const b = bias + n * Vec<T>::lanes;
    Vec<T> column[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) column[c] = load(b + c * Vec<T>::lanes);
    if (relu)
      for_tile<R, C>([&](int r, int c) { store(to.at(r, c), ReLU{}.forward(sums[r][c] + column[c])); });
    else
      for_tile<R, C>([&](int r, int c) { store(to.at(r, c), sums[r][c] + column[c]); });
  }
};

// The same where lanes are rows: y and the sums are transposed, a bias is the same in all lanes.
template <class T>
struct AddBiasOfRows {
  const T* bias;
  Result<T, true> y;
  bool relu;
  template <int R, int C>
  MLP_EXT_INLINE void operator()(int64_t n, int64_t m, Vec<T> (&sums)[R][C]) const {
    const auto to = y.from(n, m);
    const T* const b = bias + n;
    if (relu)
      for_tile<R, C>([&](int r, int c) { store(to.at(r, c), ReLU{}.forward(sums[r][c] + V(b[r]))); });
    else
      for_tile<R, C>([&](int r, int c) { store(to.at(r, c), sums[r][c] + V(b[r])); });
  }

 private:
  using V = Vec<T>;
};

// dz = act'(sums, saved) if that is done in registers, else sums. dz may be saved.
template <class T, bool transposed>
struct GradZ {
  const Activation* activation;
  Result<T, transposed> saved, dz;
  template <int R, int C>
  MLP_EXT_INLINE void operator()(int64_t m, int64_t n, Vec<T> (&sums)[R][C]) const {
    const auto from = saved.from(m, n), to = dz.from(m, n);
    const auto put = [&](auto act) {
      for_tile<R, C>([&](int r, int c) { store(to.at(r, c), act.backward(sums[r][c], load(from.at(r, c)))); });
    };
    with_act_in_registers(*activation, put, [&] { put(Identity{}); });
  }
};

// dW[n, k] = sums[k, n], or += sums
template <class T>
struct AddGradients {
  Result<T, true> dw;
  bool adds;
  template <int R, int C>
  MLP_EXT_INLINE void operator()(int64_t k, int64_t n, Vec<T> (&sums)[R][C]) const {
    const auto to = dw.from(k, n);
    if (adds)
      for_tile<R, C>([&](int r, int c) { store(to.at(r, c), load(to.at(r, c)) + sums[r][c]); });
    else
      for_tile<R, C>([&](int r, int c) { store(to.at(r, c), sums[r][c]); });
  }
};

template <class T>
inline const T* later(const T* p, int64_t bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(p) + bytes);
}

template <int R, int C, class A, class T, class Finish>
__attribute__((noinline)) void lane_tile(const A& a, const Each<T>& b, int64_t depth, int64_t i, int64_t j,
                                         const Finish& finish) {
  Vec<T> sums[R][C];
  const int64_t a_stride = a.stride, b_stride = b.stride, a_step = a.depth_stride, b_step = b.depth_stride;
  const T *ai = later(a.data, i * a_stride), *bj = later(b.data, j * b_stride);
  for (int64_t k = depth; k > 0; --k, ai = later(ai, a_step), bj = later(bj, b_step)) {
    Vec<T> column[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) column[c] = load(later(bj, c * b_stride));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<T> element = A::read(later(ai, r * a_stride));
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sums[r][c] = sums[r][c] + element * column[c];
    }
  }
  finish(i, j, sums);
}

template <int R, int C, class A, class T, class Finish>
constexpr auto tile_or_null() -> void (*)(const A&, const Each<T>&, int64_t, int64_t, int64_t, const Finish&) {
  if constexpr (R <= kMostHeight[C])
    return &lane_tile<R, C, A, T, Finish>;
  else
    return nullptr;
}

// The part of n that a tile takes: as many as possible, at the end two of nearly the same size.
inline int64_t next_part(int64_t n, int64_t most) { return n >= 2 * most ? most : n > most ? (n + 1) / 2 : n; }

// finish(i, j, sums) with sums = sum over k of a(i, k) b(j, k), for all tiles.
template <class A, class T, class Finish>
void lane_product(const A& a, const Each<T>& b, int64_t rows, int64_t columns, int64_t depth, const Finish& finish) {
  using Tile = void (*)(const A&, const Each<T>&, int64_t, int64_t, int64_t, const Finish&);
  static constexpr int highest = kMostHeight[1];
  static constexpr auto tiles = []<size_t... t>(std::index_sequence<t...>) {
    return std::array<Tile, sizeof...(t)>{tile_or_null<t % highest + 1, t / highest + 1, A, T, Finish>()...};
  }(std::make_index_sequence<highest * kMostWidth>{});
  for (int64_t j = 0, width = 0; j < columns; j += width) {
    width = next_part(columns - j, kMostWidth);
    const Tile* const by_height = tiles.data() + (width - 1) * highest - 1;
    for (int64_t i = 0, height = 0; i < rows; i += height) {
      height = next_part(rows - i, kMostHeight[width]);
      by_height[height](a, b, depth, i, j, finish);
    }
  }
}

}  // namespace
}  // namespace mlp_ext::cpu
