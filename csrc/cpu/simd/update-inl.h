// A parameter's update, fused into what makes its gradient.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/pack-inl.h"
#include "cpu/simd/vec-inl.h"
#include "math/optimizers.h"

namespace mlp_ext::cpu {
namespace {

// parameter and momentum buffer after a step along the gradient, element by element.
template <class S, class T, class Lanes>
inline __attribute__((always_inline)) void update_at(const Update& update, int64_t i, Vec<T> gradient, Lanes lanes) {
  S* const p = static_cast<S*>(update.parameter) + i;
  Vec<T> parameter = load(p, lanes), momentum_buffer;
  S* const v = update.momentum_buffer ? static_cast<S*>(update.momentum_buffer) + i : nullptr;
  if (v) momentum_buffer = load(v, lanes);
  update.sgd->update(parameter, momentum_buffer, gradient);
  if (v) store(v, momentum_buffer, lanes);
  store(p, parameter, lanes);
}

// The update with the gradient that is the sum, in order, of parts[part * stride + range], accumulators or of S.
template <class S, class Part = Accumulator<S>>
void update(const Update& update, const void* parts, int64_t count, int64_t stride, Range range) {
  using T = Accumulator<S>;
  const Part* const from = static_cast<const Part*>(parts) + range.begin;
  for_vectors<T>(range.size(), [&](int64_t i, auto lanes) {
    Vec<T> gradient = load(from + i, lanes);
    for (int64_t part = 1; part < count; ++part) gradient = gradient + load(from + part * stride + i, lanes);
    update_at<S>(update, range.begin + i, gradient, lanes);
  });
}

// The end of a product whose sums are a weight's gradient: stores them, or updates the weight.
template <class S, class T>
struct StoreOrUpdate {
  static constexpr bool whole_depth = false;
  T* result;
  int64_t stride, offset;
  const Update* update;  // or nullptr
  StoreOrUpdate from(int64_t i, int64_t j) const { return {result, stride, offset + i * stride + j, update}; }
  template <class Lanes>
  void operator()(int64_t i, int64_t j, Vec<T> v, Lanes lanes) const {
    const int64_t place = offset + i * stride + j;
    if (update)
      update_at<S>(*update, place, v, lanes);
    else
      store(result + place, v, lanes);
  }
};

}  // namespace
}  // namespace mlp_ext::cpu
