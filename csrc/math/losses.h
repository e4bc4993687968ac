// The losses: forward above backward, the formula on top. Of one element; V is a scalar or a vector of the CPU.
#pragma once

#include <cmath>

#include "math/activations.h"

namespace mlp_ext {

struct MSE {  // l = (y - t)^2,  dl/dy = 2 (y - t)
  static constexpr const char* name = "mse";
  template <class V>
  MLP_EXT_HOST_DEVICE static V forward(V y, V t) {
    return (y - t) * (y - t);
  }
  template <class V>
  MLP_EXT_HOST_DEVICE static V backward(V y, V t) {
    return 2 * (y - t);
  }
};

struct BCE {  // l = -(t log y + (1 - t) log(1 - y)), logarithms from -100 on,  dl/dy = (y - t) / max(y (1 - y), 1e-12)
  static constexpr const char* name = "bce";
  template <class V>
  MLP_EXT_HOST_DEVICE static V forward(V y, V t) {
    using std::log;
    using std::log1p;
    const auto clamped = [](V v) { return where(v < -100, -100, v); };
    return (t - 1) * clamped(log1p(-y)) - t * clamped(log(y));
  }
  template <class V>
  MLP_EXT_HOST_DEVICE static V backward(V y, V t) {
    const V slope = y * (1 - y);
    return (y - t) / where(slope < V(1e-12), V(1e-12), slope);
  }
};

struct BCEWithLogits {  // l = (1 - t) z + log(1 + exp(-z)),  dl/dz = sigmoid(z) - t
  static constexpr const char* name = "bce_with_logits";
  template <class V>
  MLP_EXT_HOST_DEVICE static V forward(V z, V t) {
    using std::exp;
    using std::log1p;
    return (1 - t) * z + where(0 <= z, 0, -z) + log1p(exp(where(z < 0, z, -z)));  // exp(-z) itself may overflow
  }
  template <class V>
  MLP_EXT_HOST_DEVICE static V backward(V z, V t) {
    return Sigmoid::forward(z) - t;
  }
};

// Of a row of N logits z and a distribution q over its classes: l = -sum q log_softmax(z),  dl/dz = Q softmax(z) - q
// with Q = sum q. Of a class c with weights w and label smoothing e, q = w_c (1 - e) at c, plus w e / N everywhere; of
// probabilities t, q = w ((1 - e) t + e / N).
struct CrossEntropy {
  static constexpr const char* name = "cross_entropy";
};

// The losses of single elements, and the one of whole rows after them.
using ElementLosses = TypeList<MSE, BCE, BCEWithLogits>;
using Losses = TypeList<MSE, BCE, BCEWithLogits, CrossEntropy>;
constexpr size_t kCrossEntropy = ElementLosses::size;  // its place

}  // namespace mlp_ext
