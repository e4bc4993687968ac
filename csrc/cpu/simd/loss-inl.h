// The loss of some rows of outputs, and its gradient. Compiled once per instruction set.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/pack-inl.h"
#include "cpu/simd/row_sums-inl.h"
#include "cpu/simd/vec-inl.h"
#include "math/activations.h"
#include "math/losses.h"

namespace mlp_ext::cpu {
namespace {

// The loss of y = act(z) for z [rows, N] without gaps, and its gradient dz.
template <class S, class Act>
struct RowsLoss {
  using T = Accumulator<S>;
  using V = Vec<T>;

  // Returns the sum of the losses, not scaled; clears `valid` where BCE meets what is no probability. `targets` has
  // room for as many T as there are in z.
  static double run(const Loss& loss, Range rows, int64_t N, const T* z, T* dz, T* targets, bool& valid) {
    const int64_t size = rows.size() * N;
    if (loss.index != kCrossEntropy) {
      const T* const t = targets_in_a_row(loss, rows, N, targets);
      return visit_activation(
          loss.index, [&](auto l) { return elements<decltype(l)>(loss, size, z, t, dz, valid); }, ElementLosses{});
    }
    if constexpr (std::is_same_v<Act, Identity>) {
      return cross_entropy(loss, rows, N, z, dz);
    } else {
      T *const y = targets, *const dy = dz;
      for_vectors<T>(size, [&](int64_t i, auto lanes) { store(y + i, Act::forward(load(z + i, lanes)), lanes); });
      const double total = cross_entropy(loss, rows, N, y, dy);
      for_vectors<T>(size, [&](int64_t i, auto lanes) {
        store(dz + i, Act::backward(load(dy + i, lanes), load(y + i, lanes)), lanes);
      });
      return total;
    }
  }

  static const T* targets_in_a_row(const Loss& loss, Range rows, int64_t N, T* targets) {
    if constexpr (std::is_same_v<S, T>)
      if (loss.target.stride == N) return at<S>(loss.target, rows.begin, 0);
    for (int64_t m = rows.begin; m < rows.end; ++m, targets += N)
      for_vectors<T>(N,
                     [&](int64_t n, auto lanes) { store(targets + n, load(at<S>(loss.target, m, n), lanes), lanes); });
    return targets - rows.size() * N;
  }

  template <class L>
  static double elements(const Loss& loss, int64_t size, const T* z, const T* t, T* dz, bool& valid) {
    const V scale = static_cast<T>(loss.scale);
    double total = 0;
    constexpr int64_t piece = kShortRows * V::lanes;
    for (int64_t begin = 0; begin < size; begin += piece) {
      V sum;
      for_vectors<T>(std::min(piece, size - begin), [&](int64_t j, auto lanes) {
        const int64_t i = begin + j;
        const V yi = Act::forward(load(z + i, lanes)), ti = load(t + i, lanes);
        if constexpr (std::is_same_v<L, BCE>) valid = valid && are_probabilities(yi) && are_probabilities(ti);
        store(dz + i, Act::backward(L::backward(yi, ti) * scale, yi), lanes);
        sum = sum + only(L::forward(yi, ti), lanes);
      });
      for (int lane = 0; lane < V::lanes; ++lane) total += static_cast<double>(sum.v[lane]);
    }
    return total;
  }

  static V only(V v, AllLanes) { return v; }
  static V only(V v, int n) {  // the loss of a lane that is not there may be anything
    typename V::Bits place;
    for (int i = 0; i < V::lanes; ++i) place[i] = i;
    return where(typename V::Mask{place < n}, v, V());
  }
  static bool are_probabilities(V v) {
    bool all = true;
    for (int i = 0; i < V::lanes; ++i) all = all && v.v[i] >= 0 && v.v[i] <= 1;
    return all;
  }

  // The terms of q times log_softmax(z), and the gradient Q softmax(z) - q.
  static double cross_entropy(const Loss& loss, Range rows, int64_t N, const T* z, T* dz) {
    const T smoothing = static_cast<T>(loss.label_smoothing), even = smoothing / static_cast<T>(N),
            scale = static_cast<T>(loss.scale);
    const S* const weights = static_cast<const S*>(loss.weight);
    const auto weight = [&](int64_t n) { return weights ? load(weights + n, 1).v[0] : T(1); };
    double total = 0;
    for (int64_t m = rows.begin; m < rows.end; ++m, z += N, dz += N) {
      const int64_t c = loss.classes ? loss.classes[m * loss.classes_stride] : -1;
      if (loss.classes && c == loss.ignore_index) {
        std::fill(dz, dz + N, T(0));
        continue;
      }
      T most = z[0];
      for (int64_t n = 1; n < N; ++n) most = z[n] > most || z[n] != z[n] ? z[n] : most;
      T sum = 0, all_q = 0, row = 0;
      for_vectors<T>(N, [&](int64_t n, auto lanes) {
        const V e = exp(load(z + n, lanes) - V(most));
        store(dz + n, e, lanes);
        sum += sum_lanes(only(e, lanes));
      });
      const T log_sum = std::log(sum) + most;
      const auto q = [&](int64_t n) {
        if (!loss.classes) return weight(n) * ((1 - smoothing) * load(at<S>(loss.target, m, n), 1).v[0] + even);
        return (n == c ? weight(n) * (1 - smoothing) : T(0)) + (smoothing == 0 ? T(0) : weight(n) * even);
      };
      for (int64_t n = 0; n < N; ++n) {
        if (loss.classes && smoothing == 0 && n != c) continue;  // 0 log 0
        row -= q(n) * (z[n] - log_sum);
        all_q += q(n);
      }
      for (int64_t n = 0; n < N; ++n) dz[n] = (dz[n] / sum * all_q - q(n)) * scale;
      total += row;
    }
    return total;
  }
};

// The loss of outputs as they lie in memory, a few rows at a time.
template <class S>
double loss_rows(const Loss& loss, Range rows, int64_t N, const void* y_data, void* dy_data, void* scratch,
                 bool& valid) {
  using T = Accumulator<S>;
  const S* const y = static_cast<const S*>(y_data);
  S* const dy = static_cast<S*>(dy_data);
  T *const targets = static_cast<T*>(scratch), *const outputs = targets + kLossRows * N,
           *const gradients = outputs + kLossRows * N;
  double total = 0;
  for (int64_t m = rows.begin; m < rows.end; m += kLossRows) {
    const Range some{m, std::min(m + kLossRows, rows.end)};
    const int64_t begin = m * N, size = some.size() * N;
    if constexpr (std::is_same_v<S, T>) {
      total += RowsLoss<S, Identity>::run(loss, some, N, y + begin, dy + begin, targets, valid);
    } else {
      for_vectors<T>(size, [&](int64_t i, auto lanes) { store(outputs + i, load(y + begin + i, lanes), lanes); });
      total += RowsLoss<S, Identity>::run(loss, some, N, outputs, gradients, targets, valid);
      for_vectors<T>(size, [&](int64_t i, auto lanes) { store(dy + begin + i, load(gradients + i, lanes), lanes); });
    }
  }
  return total;
}

}  // namespace
}  // namespace mlp_ext::cpu
