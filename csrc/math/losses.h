// Losses: the formula, then forward above backward. First elementwise losses, where V is a scalar or a CPU vector, then
// losses of whole rows. backward returns scale dl/dy: dl/dy alone may overflow where its share of a mean does not.
#pragma once

#include <cmath>
#include <cstdint>

#include "math/activations.h"

namespace mlp_ext {

// What the tensor loss_weight [N] weighs; without one all weights are 1.
enum class LossWeight { none, of_positives, of_classes };

struct MSE {  // l = (y - t)^2,  dl/dy = 2 (y - t)
  static constexpr const char* name = "mse";
  static constexpr Parameters<0> parameters{};
  static constexpr LossWeight weight = LossWeight::none;
  template <class V>
  MLP_EXT_HOST_DEVICE V forward(V y, V t, V) const {
    return (y - t) * (y - t);
  }
  template <class V>
  MLP_EXT_HOST_DEVICE V backward(V y, V t, V, V scale) const {
    return (2 * scale) * (y - t);
  }
};

struct BCE {  // l = -(t log y + (1 - t) log(1 - y)), logs clamped at -100,  dl/dy = (y - t) / max(y (1 - y), 1e-12)
  static constexpr const char* name = "bce";
  static constexpr Parameters<0> parameters{};
  static constexpr LossWeight weight = LossWeight::none;
  static constexpr bool of_probabilities = true;  // y and t outside [0, 1] are an error
  template <class V>
  MLP_EXT_HOST_DEVICE V forward(V y, V t, V) const {
    using std::log;
    using std::log1p;
    const auto clamped = [](V v) { return where(v < -100, -100, v); };
    return (t - 1) * clamped(log1p(-y)) - t * clamped(log(y));
  }
  template <class V>
  MLP_EXT_HOST_DEVICE V backward(V y, V t, V, V scale) const {
    const V slope = y * (1 - y), least = 1e-12f;  // a float in torch, also in float64
    return (y - t) / where(slope < least, least, slope) * scale;
  }
};

struct BCEWithLogits {  // l = (1 - t) z + (1 + (w - 1) t) log(1 + exp(-z)),  dl/dz = (1 + (w - 1) t) sigmoid(z) - w t
  static constexpr const char* name = "bce_with_logits";
  static constexpr Parameters<0> parameters{};
  static constexpr LossWeight weight = LossWeight::of_positives;
  template <class V>
  MLP_EXT_HOST_DEVICE V forward(V z, V t, V w) const {
    using std::exp;
    using std::log1p;
    const V softplus = where(0 <= z, 0, -z) + log1p(exp(where(z < 0, z, -z)));  // exp(-z) itself may overflow
    return (1 - t) * z + factor(w, (w - 1) * t + 1) * softplus;
  }
  template <class V>
  MLP_EXT_HOST_DEVICE V backward(V z, V t, V w, V scale) const {
    return (factor(w, w * t + 1 - t) * Sigmoid{}.forward(z) - w * t) * scale;
  }

 private:
  // 1 + (w - 1) t as torch orders it, which decides where infinite t give NaN; 1 without a weight.
  template <class V>
  MLP_EXT_HOST_DEVICE V factor(V w, V value) const {
    return where(w <= 1, where(1 <= w, 1, value), value);
  }
};

template <class V>
MLP_EXT_HOST_DEVICE V magnitude(V v) {
  return where(v < 0, -v, v);
}
template <class V>
MLP_EXT_HOST_DEVICE V sign(V v) {
  return where(v < 0, V(-1), where(0 < v, V(1), V(0)));
}

struct L1 {  // l = |y - t|,  dl/dy = sign(y - t)
  static constexpr const char* name = "l1";
  static constexpr Parameters<0> parameters{};
  static constexpr LossWeight weight = LossWeight::none;
  template <class V>
  MLP_EXT_HOST_DEVICE V forward(V y, V t, V) const {
    return magnitude(y - t);
  }
  template <class V>
  MLP_EXT_HOST_DEVICE V backward(V y, V t, V, V scale) const {
    return sign(y - t) * scale;
  }
};

struct SmoothL1 {  // d = y - t,  l = d^2 / (2 beta) where |d| < beta, else |d| - beta / 2   (Girshick, ICCV 2015)
  static constexpr const char* name = "smooth_l1";
  static constexpr Parameters<1> parameters{{{"beta", 1}}};
  static constexpr LossWeight weight = LossWeight::none;
  double beta = 1;
  template <class V>
  MLP_EXT_HOST_DEVICE V forward(V y, V t, V) const {
    const V d = y - t, size = magnitude(d);
    return where(size < V(beta), V(0.5) * d * d / V(beta), size - V(0.5 * beta));
  }
  template <class V>
  MLP_EXT_HOST_DEVICE V backward(V y, V t, V w, V scale) const {
    if (beta == 0) return L1{}.backward(y, t, w, scale);
    const V d = y - t;
    return where(V(beta) <= magnitude(d), sign(d), d / V(beta)) * scale;  // NaN if d is
  }
};

struct Huber {  // d = y - t,  l = d^2 / 2 where |d| <= delta, else delta (|d| - delta / 2)   (Huber, 1964)
  static constexpr const char* name = "huber";
  static constexpr Parameters<1> parameters{{{"delta", 1}}};
  static constexpr LossWeight weight = LossWeight::none;
  double delta = 1;
  template <class V>
  MLP_EXT_HOST_DEVICE V forward(V y, V t, V) const {
    const V d = y - t, size = magnitude(d);
    return where(size <= V(delta), V(0.5) * d * d, V(delta) * (size - V(0.5 * delta)));
  }
  template <class V>
  MLP_EXT_HOST_DEVICE V backward(V y, V t, V, V scale) const {
    const V d = y - t;
    return where(V(delta) < magnitude(d), V(delta) * sign(d), d) * scale;  // NaN if d is
  }
};

// ---- losses of whole rows ----
//
// A Row provides, for one row of N outputs, or one of each network in lanes:
//   z(n)           the outputs
//   c(), t(n)      the class c, or -1 if the target is probabilities t
//   w(n)           the class weights; in lanes, 0 where the row is ignored
//   sum_exp(most)  sum over n of exp(z(n) - most)
//   exp(n, most)   its terms, after a call of sum_exp
//   put(n, dz)     stores the gradient, possibly over z(n)
// The class may be another type with these functions.
MLP_EXT_HOST_DEVICE bool has_class(int64_t c) { return c >= 0; }
MLP_EXT_HOST_DEVICE bool is_class(int64_t c, int64_t n) { return n == c; }
template <class F>
MLP_EXT_HOST_DEVICE auto of_class(int64_t c, int64_t, const F& f) {  // f(c)
  return f(c);
}
template <class T, class Row>
MLP_EXT_HOST_DEVICE T largest(const Row& row, int64_t N) {
  T most = row.z(0);
  for (int64_t n = 1; n < N; ++n) {
    const T z = row.z(n);
    most = where(z <= most, most, z);
  }
  return most;
}

// l = -sum q log_softmax(z),  dl/dz = Q softmax(z) - q,  Q = sum q.  With label smoothing e,
// q(n) = w(n) ((1 - e) [n = c] + e / N) for a class c, or w(n) ((1 - e) t(n) + e / N) for probabilities t.
struct CrossEntropy {
  static constexpr const char* name = "cross_entropy";
  static constexpr Parameters<2> parameters{{{"ignore_index", -100}, {"label_smoothing", 0}}};
  static constexpr LossWeight weight = LossWeight::of_classes;
  static constexpr bool takes_probabilities = true;
  double ignore_index = -100, label_smoothing = 0;

  // Stores scale * dl/dz; returns the unscaled loss.
  template <class T, class Row>
  MLP_EXT_HOST_DEVICE T row(Row row, int64_t N, T scale) const {
    using std::log;
    const auto c = row.c();
    const bool smooth = label_smoothing != 0;
    const T smoothing = static_cast<T>(label_smoothing), even = smoothing / static_cast<T>(N);
    const auto q = [&](int64_t n) -> T {
      if (!has_class(c)) return row.w(n) * ((1 - smoothing) * row.t(n) + even);
      return where(is_class(c, n), row.w(n) * (1 - smoothing), T(0)) + (smooth ? row.w(n) * even : T(0));
    };
    const T most = largest<T>(row, N);
    T all_q = 0, loss = 0;
    const T sum = row.sum_exp(most), log_sum = log(sum);
    const auto term = [&](int64_t n) -> T { return q(n) * ((row.z(n) - most) - log_sum); };  // small, unlike most
    if (has_class(c) && !smooth) {                                                           // no 0 log 0
      loss = -of_class(c, N, term);
      all_q = of_class(c, N, q);
    } else {
      for (int64_t n = 0; n < N; ++n) {
        loss = loss - term(n);
        all_q = all_q + q(n);
      }
    }
    for (int64_t n = 0; n < N; ++n) row.put(n, (row.exp(n, most) / sum * all_q - q(n)) * scale);
    return loss;
  }
  // dl/dz of an ignored row: 0 softmax(z), NaN where that is
  template <class T, class Row>
  MLP_EXT_HOST_DEVICE void ignored_row(Row row, int64_t N) const {
    const T zero = 0 * row.sum_exp(largest<T>(row, N));
    for (int64_t n = 0; n < N; ++n) row.put(n, zero);
  }
};

struct NLL {  // log-probabilities y, class c:  l = -w(c) y(c),  dl/dy(n) = -w(c) [n = c]
  static constexpr const char* name = "nll";
  static constexpr Parameters<1> parameters{{{"ignore_index", -100}}};
  static constexpr LossWeight weight = LossWeight::of_classes;
  static constexpr bool takes_probabilities = false;
  double ignore_index = -100;

  template <class T, class Row>
  MLP_EXT_HOST_DEVICE T row(Row row, int64_t N, T scale) const {
    const auto c = row.c();
    const T loss = of_class(c, N, [&](int64_t n) -> T { return -row.w(n) * row.z(n); });
    const T slope = of_class(c, N, [&](int64_t n) -> T { return -row.w(n) * scale; });
    for (int64_t n = 0; n < N; ++n) row.put(n, where(is_class(c, n), slope, T(0)));
    return loss;
  }
  template <class T, class Row>
  MLP_EXT_HOST_DEVICE void ignored_row(Row row, int64_t N) const {
    for (int64_t n = 0; n < N; ++n) row.put(n, T(0));
  }
};

using Losses = TypeList<MSE, BCE, BCEWithLogits, L1, SmoothL1, Huber, CrossEntropy, NLL>;
struct LossFunction : Chosen<Losses> {
  using Chosen::Chosen;
  LossFunction() = default;
  LossFunction(const Chosen<Losses>& chosen) : Chosen(chosen) {}
};

// Traits of a loss.
template <class Loss>
constexpr bool is_of_rows = requires { Loss::takes_probabilities; };  // rather than of elements
template <class Loss>
constexpr bool is_of_probabilities = requires { Loss::of_probabilities; };

// The class that a loss of rows ignores; -1 if the loss has none.
inline int64_t ignore_index_of(const LossFunction& loss) {
  return visit(loss, [](auto l) -> int64_t {
    if constexpr (is_of_rows<decltype(l)>)
      return static_cast<int64_t>(l.ignore_index);
    else
      return -1;
  });
}
inline bool is_of_rows_loss(const LossFunction& loss) {
  return visit(loss, [](auto l) { return is_of_rows<decltype(l)>; });
}

}  // namespace mlp_ext
