// Products of matrices of vectors: an element has a number for each lane.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/epilogue-inl.h"
#include "cpu/simd/vec-inl.h"

namespace mlp_ext::cpu {
namespace {

// Operands: element (i, k) is at i stride + k depth_stride, and is a number for each lane or the same in all lanes.
template <class T>
struct Each {
  static constexpr int64_t size = Vec<T>::lanes;
  const T* data;
  int64_t stride, depth_stride;
  static Vec<T> read(const T* p) { return load(p); }
};
template <class T>
struct Same {
  static constexpr int64_t size = 1;
  const T* data;
  int64_t stride, depth_stride;
  static Vec<T> read(const T* p) { return *p; }
};

// Register blocking: rows x columns accumulators, and a column and an element of the operands.
constexpr int kLaneTileRows = 4;
#if defined(__aarch64__)
constexpr int kLaneTileColumns = 4;
#else
constexpr int kLaneTileColumns = kVectorBytes == 64 ? 4 : 3;
#endif

// Epilogues take a tile of sums from (i, j) on; z, y, saved, dz are [rows, N], all with a number for each lane.

// z = sums + b, or y = relu(z)
template <class T>
struct AddBias {
  const T* bias;
  T* y;
  int64_t N;
  bool relu;
  template <int R, int C>
  MLP_EXT_INLINE void operator()(int64_t m, int64_t n, const Vec<T> (&sums)[R][C]) const {
    relu ? put(ReLU{}, m, n, sums) : put(Identity{}, m, n, sums);
  }
  template <class Act, int R, int C>
  MLP_EXT_INLINE void put(Act act, int64_t m, int64_t n, const Vec<T> (&sums)[R][C]) const {
    constexpr int64_t lanes = Vec<T>::lanes;
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const Vec<T> b = load(bias + (n + c) * lanes);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) store(y + ((m + r) * N + n + c) * lanes, act.forward(sums[r][c] + b));
    }
  }
};

// dz = act'(sums, saved) if that is done in registers, else sums. dz may be saved.
template <class T>
struct GradZ {
  const Activation* activation;
  const T* saved;
  T* dz;
  int64_t N;
  template <int R, int C>
  MLP_EXT_INLINE void operator()(int64_t m, int64_t n, const Vec<T> (&sums)[R][C]) const {
    constexpr int64_t lanes = Vec<T>::lanes;
    const auto put = [&](auto act) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
          const int64_t at = ((m + r) * N + n + c) * lanes;
          store(dz + at, act.backward(sums[r][c], load(saved + at)));
        }
    };
    with_act_in_registers(*activation, put, [&] { put(Identity{}); });
  }
};

// dW[n, k] = sums[k, n], or += sums
template <class T>
struct AddGradients {
  T* dw;
  int64_t K;
  bool adds;
  template <int R, int C>
  MLP_EXT_INLINE void operator()(int64_t k, int64_t n, const Vec<T> (&sums)[R][C]) const {
    constexpr int64_t lanes = Vec<T>::lanes;
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        T* const at = dw + ((n + c) * K + k + r) * lanes;
        store(at, adds ? load(at) + sums[r][c] : sums[r][c]);
      }
  }
};

template <int R, int C, class A, class T, class Finish>
__attribute__((noinline)) void lane_tile(const A& a, const Each<T>& b, int64_t depth, int64_t i, int64_t j,
                                         const Finish& finish) {
  Vec<T> sums[R][C];
  const T *ai = a.data + i * a.stride, *bj = b.data + j * b.stride;
  const int64_t a_stride = a.stride, b_stride = b.stride, a_step = a.depth_stride, b_step = b.depth_stride;
  for (int64_t k = 0; k < depth; ++k, ai += a_step, bj += b_step) {
    Vec<T> column[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) column[c] = load(bj + c * b_stride);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<T> element = A::read(ai + r * a_stride);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sums[r][c] = sums[r][c] + element * column[c];
    }
  }
  finish(i, j, sums);
}

// The tile to take from n: whole ones, then two of nearly the same size.
template <int most>
int64_t next_part(int64_t n) {
  return n >= 2 * most ? most : n > most ? (n + 1) / 2 : n;
}

// finish(i, j, sums) with sums = sum over k of a(i, k) b(j, k), for all tiles. Strides are in elements.
template <class A, class T, class Finish>
void lane_product(A a, Each<T> b, int64_t rows, int64_t columns, int64_t depth, const Finish& finish) {
  a.stride *= A::size, a.depth_stride *= A::size;
  b.stride *= b.size, b.depth_stride *= b.size;
  using Tile = void (*)(const A&, const Each<T>&, int64_t, int64_t, int64_t, const Finish&);
  static constexpr auto tiles = []<size_t... t>(std::index_sequence<t...>) {
    return std::array<Tile, sizeof...(t)>{
        &lane_tile<t / kLaneTileColumns + 1, t % kLaneTileColumns + 1, A, T, Finish>...};
  }(std::make_index_sequence<kLaneTileRows * kLaneTileColumns>{});
  for (int64_t j = 0, width = 0; j < columns; j += width) {
    width = next_part<kLaneTileColumns>(columns - j);
    for (int64_t i = 0, height = 0; i < rows; i += height) {
      height = next_part<kLaneTileRows>(rows - i);
      tiles[(height - 1) * kLaneTileColumns + width - 1](a, b, depth, i, j, finish);
    }
  }
}

}  // namespace
}  // namespace mlp_ext::cpu
