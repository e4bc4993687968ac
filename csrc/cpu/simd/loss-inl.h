// The loss of a block of outputs, and its gradient with respect to z.
#pragma once

#include "cpu/simd/epilogue-inl.h"

namespace mlp_ext::cpu {
namespace {

// Loss of y = act(z) and its gradient dz, for contiguous z [rows, N] of T. Returns the unscaled sum of the losses.
// scratch: [2 rows + 1, N] of T.
template <class S, class T = Accumulator<S>>
double loss_of_rows(const Loss& loss, const Activation& activation, Range rows, int64_t N, const T* z, T* dz,
                    T* scratch, bool& valid) {
  const int64_t size = rows.size() * N;
  if (activation.index == kIdentity) return pointwise_of<S>().loss(loss, rows, N, z, dz, scratch, valid);
  const PointwiseKernels& of_t = pointwise_of<T>();
  T* const y = scratch;
  of_t.act(activation, {z, 0}, {y, 0}, 1, size, false);
  const double total = pointwise_of<S>().loss(loss, rows, N, y, dz, scratch + size, valid);
  of_t.grad_z(activation, {dz, 0}, {needs_z(activation) ? z : y, 0}, {dz, 0}, nullptr, 1, size);
  return total;
}

// Loss and gradient of outputs y in memory, kLossRows at a time.
template <class S>
double loss_rows(const Loss& loss, Range rows, int64_t N, const void* y_data, void* dy_data, void* scratch,
                 bool& valid) {
  using T = Accumulator<S>;
  const S* const y = static_cast<const S*>(y_data);
  S* const dy = static_cast<S*>(dy_data);
  T *const outputs = static_cast<T*>(scratch), *const gradients = outputs + kLossRows * N,
           *const rest = gradients + kLossRows * N;
  double total = 0;
  for (int64_t m = rows.begin; m < rows.end; m += kLossRows) {
    const Range some{m, std::min(m + kLossRows, rows.end)};
    const int64_t begin = m * N, size = some.size() * N;
    if constexpr (std::is_same_v<S, T>) {
      total += pointwise_of<S>().loss(loss, some, N, y + begin, dy + begin, rest, valid);
    } else {
      for_vectors<T>(size, [&](int64_t i, auto lanes) { store(outputs + i, load(y + begin + i, lanes), lanes); });
      total += pointwise_of<S>().loss(loss, some, N, outputs, gradients, rest, valid);
      for_vectors<T>(size, [&](int64_t i, auto lanes) { store(dy + begin + i, load(gradients + i, lanes), lanes); });
    }
  }
  return total;
}

}  // namespace
}  // namespace mlp_ext::cpu
