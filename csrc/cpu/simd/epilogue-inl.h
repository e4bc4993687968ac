// Epilogues of GEMMs, and calls into the kernels of pointwise-inl.h.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/gemm-inl.h"
#include "cpu/simd/pack-inl.h"
#include "cpu/simd/vec-inl.h"
#include "math/activations.h"

namespace mlp_ext::cpu {
namespace MLP_EXT_TARGET {
const PointwiseKernels& pointwise(DType dtype);
}

namespace {

template <class S>
constexpr DType kDTypeOf = std::is_same_v<S, float>      ? DType::float32
                           : std::is_same_v<S, double>   ? DType::float64
                           : std::is_same_v<S, BFloat16> ? DType::bfloat16
                                                         : DType::float16;
template <class S>
const PointwiseKernels& pointwise_of() {
  return MLP_EXT_TARGET::pointwise(kDTypeOf<S>);
}

// dz = act'(dy, saved) for a block, as accumulators. Adds the sum over its rows (up to kShortRows) to db, if given.
template <class S, class T = Accumulator<S>>
void grad_z_rows(const Backward& b, Range rows, Range columns, T* dz, int64_t stride, T* db = nullptr) {
  pointwise_of<S>().grad_z(*b.activation, {at<S>(b.dy, rows.begin, columns.begin), b.dy.stride},
                           {b.saved.data ? at<S>(b.saved, rows.begin, columns.begin) : nullptr, b.saved.stride},
                           {dz, stride}, db, rows.size(), columns.size());
}

template <class Act>
constexpr size_t kIndexOf = index_of(Act::name, Activations{});
constexpr size_t kIdentity = kIndexOf<Identity>, kReLU = kIndexOf<ReLU>;
using InRegisters = TypeList<Identity, ReLU, Sigmoid, Tanh>;

inline bool needs_z(const Activation& activation) {
  return visit(activation, [](auto act) { return act.needs() == Needs::preactivation; });
}

// Calls f(Act()) for activations that are applied to sums in registers; for others otherwise(), which applies them to
// tiles in L1. Sigmoid and tanh are 10 % faster in registers (zen4, 4096x64x64).
template <class F, class Otherwise>
void with_act_in_registers(const Activation& activation, const F& f, const Otherwise& otherwise) {
  const bool found = [&]<class... Act>(TypeList<Act...>) {
    return ((activation.index == kIndexOf<Act> ? (f(Act{}), true) : false) || ...);
  }(InRegisters{});
  if (!found) otherwise();
}

// Epilogue in registers: y = act(z + b), rounded.
template <class S, class Act>
struct BiasAct {
  static constexpr bool whole_depth = false;
  const S* bias;  // or nullptr
  S* y;
  int64_t stride;
  bool past_caches;
  BiasAct from(int64_t i, int64_t j) const { return {bias ? bias + j : bias, y + i * stride + j, stride, past_caches}; }
  template <class V, class Lanes>
  void operator()(int64_t i, int64_t j, V z, Lanes lanes) const {
    if (bias) z = z + load(bias + j, lanes);
    store_result(y + i * stride + j, Act{}.forward(z), lanes, past_caches);
  }
};

// The same for tiles in L1 and any activation. Also stores z + b to z, if given.
template <class S, int sums_stride = Tile<Accumulator<S>>::columns>
struct BiasActTile {
  static constexpr bool whole_depth = false, takes_tiles = true;
  using T = Accumulator<S>;
  const Activation* activation;
  const S* bias;  // or nullptr
  S *y, *z;       // z: or nullptr
  int64_t stride, z_stride;
  bool past_caches;
  BiasActTile from(int64_t i, int64_t j) const {
    return {activation, bias ? bias + j : bias, y + i * stride + j, z ? z + i * z_stride + j : z, stride, z_stride,
            past_caches};
  }
  void tile(int64_t i, int64_t j, T* sums, int rows, int width) const {
    if (bias || z)
      for_sums<sums_stride>(sums, rows, width, [&](int r, int c, Vec<T> v, auto lanes) {
        if (bias) v = v + load(bias + j + c, lanes);
        store(sums + r * sums_stride + c, v, lanes);
        if (z) store(z + (i + r) * z_stride + j + c, v, lanes);
      });
    pointwise_of<S>().act(*activation, {sums, sums_stride}, {y + i * stride + j, stride}, rows, width, past_caches);
  }
};

// Epilogue of the dW GEMM: updates W tile by tile.
template <class S>
struct UpdateTile {
  static constexpr bool whole_depth = false, takes_tiles = true;
  using T = Accumulator<S>;
  const Update* update;
  int64_t begin, stride;  // in elements of W
  UpdateTile from(int64_t i, int64_t j) const { return {update, begin + i * stride + j, stride}; }
  void tile(int64_t i, int64_t j, T* sums, int rows, int width) const {
    pointwise_of<S>().update(*update, begin + i * stride + j, stride, {sums, Tile<T>::columns}, rows, width);
  }
};

// The sum over p of parts[p * stride]. There is a part for each 2^15 rows: eight at a time, sums keep their digits.
template <class T, class Part, class Lanes>
Vec<T> sum_of_parts(const Part* parts, int64_t count, int64_t stride, Lanes lanes) {
  Vec<T> total;
  for (int64_t begin = 0; begin < count; begin += 8) {
    Vec<T> sum = load(parts + begin * stride, lanes);
    for (int64_t p = begin + 1; p < std::min(begin + 8, count); ++p) sum = sum + load(parts + p * stride, lanes);
    total = total + sum;
  }
  return total;
}

// Updates with the gradient sum over p of parts[p * stride + range], added in order. Parts are accumulators or S.
template <class S, class Part = Accumulator<S>>
void update_by_parts(const Update& update, const void* parts, int64_t count, int64_t stride, Range range) {
  using T = Accumulator<S>;
  constexpr int64_t chunk = 512;
  alignas(kVectorBytes) T sums[chunk];
  for (int64_t begin = range.begin; begin < range.end; begin += chunk) {
    const int64_t size = std::min(chunk, range.end - begin);
    const Part* const from = static_cast<const Part*>(parts) + begin;
    for_vectors<T>(
        size, [&](int64_t i, auto lanes) { store(sums + i, sum_of_parts<T>(from + i, count, stride, lanes), lanes); });
    pointwise_of<S>().update(update, begin, 0, {sums, 0}, 1, size);
  }
}

}  // namespace
}  // namespace mlp_ext::cpu
