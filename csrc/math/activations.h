// Activations: the formula, then forward above backward.
//
// One functor serves scalars, CPU vectors and CUDA threads: V needs + - * /, < <=, | of comparisons, where(), and the
// functions in the formula. It also serves at::Tensor, as a composite of PyTorch's operations. If PyTorch has the
// activation, `native` and `native_backward` call it (by argument-dependent lookup): a composite may be NaN at extreme
// values where PyTorch's operation and its derivatives are not.
#pragma once

#include <cmath>

#include "math/type_list.h"

namespace mlp_ext {

// What backward needs beside dy, passed as `saved`: nothing, y, or z = x W^T + b.
enum class Needs { nothing, output, preactivation };

struct Identity {  // y = z,  dz = dy
  static constexpr const char* name = "identity";
  static constexpr Parameters<0> parameters{};
  MLP_EXT_HOST_DEVICE constexpr Needs needs() const { return Needs::nothing; }
  template <class V>
  MLP_EXT_HOST_DEVICE V forward(V z) const {
    return z;
  }
  template <class V>
  MLP_EXT_HOST_DEVICE V backward(V dy, V) const {
    return dy;
  }
};

struct ReLU {  // y = max(z, 0), NaN propagates,  dz = dy where y > 0 or y is NaN, else 0
  static constexpr const char* name = "relu";
  static constexpr Parameters<0> parameters{};
  MLP_EXT_HOST_DEVICE constexpr Needs needs() const { return Needs::output; }
  template <class V>
  MLP_EXT_HOST_DEVICE V forward(V z) const {
    return where(z < 0, 0, z);
  }
  template <class V>
  MLP_EXT_HOST_DEVICE V backward(V dy, V y) const {
    return where(y <= 0, 0, dy);
  }
  template <class Tensor>
  Tensor native(const Tensor& z) const {
    return relu(z);
  }
  template <class Tensor>
  Tensor native_backward(const Tensor& dy, const Tensor& y) const {
    return threshold_backward(dy, y, 0);
  }
};

struct Sigmoid {  // y = 1 / (1 + exp(-z)),  dz = dy y (1 - y)
  static constexpr const char* name = "sigmoid";
  static constexpr Parameters<0> parameters{};
  MLP_EXT_HOST_DEVICE constexpr Needs needs() const { return Needs::output; }
  template <class V>
  MLP_EXT_HOST_DEVICE V forward(V z) const {
    using std::exp;
    return 1 / (1 + exp(-z));
  }
  template <class V>
  MLP_EXT_HOST_DEVICE V backward(V dy, V y) const {
    return dy * (1 - y) * y;
  }
  template <class Tensor>
  Tensor native(const Tensor& z) const {
    return sigmoid(z);
  }
  template <class Tensor>
  Tensor native_backward(const Tensor& dy, const Tensor& y) const {
    return sigmoid_backward(dy, y);
  }
};

struct Tanh {  // y = tanh z,  dz = dy (1 - y^2)
  static constexpr const char* name = "tanh";
  static constexpr Parameters<0> parameters{};
  MLP_EXT_HOST_DEVICE constexpr Needs needs() const { return Needs::output; }
  template <class V>
  MLP_EXT_HOST_DEVICE V forward(V z) const {
    using std::tanh;
    return tanh(z);
  }
  template <class V>
  MLP_EXT_HOST_DEVICE V backward(V dy, V y) const {
    return dy * (1 - y * y);
  }
  template <class Tensor>
  Tensor native(const Tensor& z) const {
    return tanh(z);
  }
  template <class Tensor>
  Tensor native_backward(const Tensor& dy, const Tensor& y) const {
    return tanh_backward(dy, y);
  }
};

struct LeakyReLU {  // y = z where z > 0, else s z,  dz = dy where z > 0, else s dy   (Maas et al., ICML 2013)
  static constexpr const char* name = "leaky_relu";
  static constexpr Parameters<1> parameters{{{"negative_slope", 0.01}}};
  double negative_slope = 0.01;
  // y would do unless the slope is negative. But with PyTorch, y may be changed in place.
  MLP_EXT_HOST_DEVICE constexpr Needs needs() const { return Needs::preactivation; }
  template <class V>
  MLP_EXT_HOST_DEVICE V forward(V z) const {
    return where(V(0) < z, z, V(negative_slope) * z);
  }
  template <class V>
  MLP_EXT_HOST_DEVICE V backward(V dy, V saved) const {
    return where(V(0) < saved, dy, V(negative_slope) * dy);
  }
  template <class Tensor>
  Tensor native(const Tensor& z) const {
    return leaky_relu(z, negative_slope);
  }
  template <class Tensor>
  Tensor native_backward(const Tensor& dy, const Tensor& saved) const {
    return leaky_relu_backward(dy, saved, negative_slope, /*self_is_result=*/false);
  }
};

struct ELU {  // y = z where z > 0, else a (exp z - 1),  dz = dy where z > 0, else dy a exp z   (Clevert et al., ICLR
              // 2016)
  static constexpr const char* name = "elu";
  static constexpr Parameters<1> parameters{{{"alpha", 1}}};
  double alpha = 1;
  MLP_EXT_HOST_DEVICE constexpr Needs needs() const { return Needs::preactivation; }
  template <class V>
  MLP_EXT_HOST_DEVICE V forward(V z) const {
    using std::expm1;
    return where(z < 0, V(alpha) * expm1(z), z);
  }
  template <class V>
  MLP_EXT_HOST_DEVICE V backward(V dy, V z) const {
    using std::exp;
    return where(V(0) < z, dy, dy * (V(alpha) * exp(z)));
  }
  template <class Tensor>
  Tensor native(const Tensor& z) const {
    return elu(z, alpha);
  }
  template <class Tensor>
  Tensor native_backward(const Tensor& dy, const Tensor& z) const {
    return elu_backward(dy, alpha, 1, 1, /*is_result=*/false, z);
  }
};

struct SELU {  // the ELU of a = 1.673, times 1.051, which keeps mean and variance   (Klambauer et al., NeurIPS 2017)
  static constexpr const char* name = "selu";
  static constexpr Parameters<0> parameters{};
  static constexpr double kAlpha = 1.6732632423543772848170429916717, kScale = 1.0507009873554804934193349852946;
  MLP_EXT_HOST_DEVICE constexpr Needs needs() const { return Needs::preactivation; }
  template <class V>
  MLP_EXT_HOST_DEVICE V forward(V z) const {
    return V(kScale) * ELU{kAlpha}.forward(z);
  }
  template <class V>
  MLP_EXT_HOST_DEVICE V backward(V dy, V z) const {
    return V(kScale) * ELU{kAlpha}.backward(dy, z);
  }
  template <class Tensor>
  Tensor native(const Tensor& z) const {
    return selu(z);
  }
  template <class Tensor>
  Tensor native_backward(const Tensor& dy, const Tensor& z) const {
    return elu_backward(dy, kAlpha, kScale, 1, /*is_result=*/false, z);
  }
};

struct SiLU {  // y = z s(z),  dz = dy s (1 + z (1 - s)) with s = sigmoid(z)   (Elfwing et al., Neural Networks 2018)
  static constexpr const char* name = "silu";
  static constexpr Parameters<0> parameters{};
  MLP_EXT_HOST_DEVICE constexpr Needs needs() const { return Needs::preactivation; }
  template <class V>
  MLP_EXT_HOST_DEVICE V forward(V z) const {
    using std::exp;
    return z / (1 + exp(-z));
  }
  template <class V>
  MLP_EXT_HOST_DEVICE V backward(V dy, V z) const {
    const V s = Sigmoid{}.forward(z);
    return dy * s * (1 + z * (1 - s));
  }
  template <class Tensor>
  Tensor native(const Tensor& z) const {
    return silu(z);
  }
  template <class Tensor>
  Tensor native_backward(const Tensor& dy, const Tensor& z) const {
    const Tensor s = sigmoid(z);  // silu_backward has no derivative
    return dy * s * (1 + z * (1 - s));
  }
};

struct GELU {  // y = z Phi(z),  dz = dy (Phi(z) + z phi(z)) with Phi(z) = (1 + erf(z / sqrt 2)) / 2   (Hendrycks, 2016)
  static constexpr const char* name = "gelu";
  static constexpr Parameters<0> parameters{};
  static constexpr double kRootHalf = 0.70710678118654752440, kDensityAt0 = 0.39894228040143267794;
  MLP_EXT_HOST_DEVICE constexpr Needs needs() const { return Needs::preactivation; }
  template <class V>
  MLP_EXT_HOST_DEVICE static V distribution(V z) {
    using std::erf;
    return V(0.5) * (1 + erf(z * V(kRootHalf)));
  }
  template <class V>
  MLP_EXT_HOST_DEVICE V forward(V z) const {
    return z * distribution(z);
  }
  template <class V>
  MLP_EXT_HOST_DEVICE V backward(V dy, V z) const {
    using std::exp;
    return dy * (distribution(z) + z * (V(kDensityAt0) * exp(V(-0.5) * z * z)));
  }
  template <class Tensor>
  Tensor native(const Tensor& z) const {
    return gelu(z, "none");
  }
  template <class Tensor>
  Tensor native_backward(const Tensor& dy, const Tensor& z) const {
    return gelu_backward(dy, z, "none");
  }
};

struct GELUTanh {  // y = z (1 + t) / 2,  dz = dy ((1 + t) + z (1 - t^2) u') / 2,  t = tanh u,  u = 0.798 (z + 0.0447
                   // z^3)
  static constexpr const char* name = "gelu_tanh";
  static constexpr Parameters<0> parameters{};
  static constexpr double kScale = 0.79788456080286535588, kCubic = 0.044715;
  MLP_EXT_HOST_DEVICE constexpr Needs needs() const { return Needs::preactivation; }
  template <class V>
  MLP_EXT_HOST_DEVICE static V inner(V z) {
    using std::tanh;
    return tanh(V(kScale) * (z + V(kCubic) * z * z * z));
  }
  template <class V>
  MLP_EXT_HOST_DEVICE V forward(V z) const {
    return V(0.5) * z * (1 + inner(z));
  }
  template <class V>
  MLP_EXT_HOST_DEVICE V backward(V dy, V z) const {
    const V t = inner(z), slope = V(kScale) * (1 + V(3 * kCubic) * z * z);
    return dy * (V(0.5) * (1 + t) + V(0.5) * z * (1 - t * t) * slope);
  }
  template <class Tensor>
  Tensor native(const Tensor& z) const {
    return gelu(z, "tanh");
  }
  template <class Tensor>
  Tensor native_backward(const Tensor& dy, const Tensor& z) const {
    return gelu_backward(dy, z, "tanh");
  }
};

struct Softplus {  // y = log(1 + exp(b z)) / b,  dz = dy sigmoid(b z);  where b z > threshold, y = z and dz = dy
  static constexpr const char* name = "softplus";
  static constexpr Parameters<2> parameters{{{"beta", 1}, {"threshold", 20}}};
  double beta = 1, threshold = 20;
  MLP_EXT_HOST_DEVICE constexpr Needs needs() const { return Needs::preactivation; }
  template <class V>
  MLP_EXT_HOST_DEVICE V forward(V z) const {
    using std::exp;
    using std::log1p;
    const V scaled = V(beta) * z;
    return where(V(threshold) < scaled, z, log1p(exp(scaled)) / V(beta));
  }
  template <class V>
  MLP_EXT_HOST_DEVICE V backward(V dy, V z) const {
    const V scaled = V(beta) * z;
    return where(V(threshold) < scaled, dy, dy * Sigmoid{}.forward(scaled));
  }
  template <class Tensor>
  Tensor native(const Tensor& z) const {
    return softplus(z, beta, threshold);
  }
  template <class Tensor>
  Tensor native_backward(const Tensor& dy, const Tensor& z) const {
    return softplus_backward(dy, z, beta, threshold);
  }
};

struct Hardtanh {  // y = min(max(z, low), high), NaN propagates,  dz = dy where low < z < high or z is NaN, else 0
  static constexpr const char* name = "hardtanh";
  static constexpr Parameters<2> parameters{{{"min_val", -1}, {"max_val", 1}}};
  double min_val = -1, max_val = 1;
  MLP_EXT_HOST_DEVICE constexpr Needs needs() const { return Needs::preactivation; }  // as LeakyReLU
  template <class V>
  MLP_EXT_HOST_DEVICE V forward(V z) const {
    const V low(min_val), high(max_val);
    return where(z < low, low, where(high < z, high, z));
  }
  template <class V>
  MLP_EXT_HOST_DEVICE V backward(V dy, V saved) const {
    return where((saved <= V(min_val)) | (V(max_val) <= saved), 0, dy);
  }
  template <class Tensor>
  Tensor native(const Tensor& z) const {
    return hardtanh(z, min_val, max_val);
  }
  template <class Tensor>
  Tensor native_backward(const Tensor& dy, const Tensor& saved) const {
    return hardtanh_backward(dy, saved, min_val, max_val);
  }
};

struct Mish {  // y = z t,  dz = dy (t + z s (1 - t^2)) with t = tanh(softplus(z)), s = sigmoid(z)   (Misra, BMVC 2020)
  static constexpr const char* name = "mish";
  static constexpr Parameters<0> parameters{};
  MLP_EXT_HOST_DEVICE constexpr Needs needs() const { return Needs::preactivation; }
  // tanh(log(1 + e)) = (e^2 + 2 e) / (e^2 + 2 e + 2); it rounds to 1 from z = 20 on, before e^2 overflows.
  template <class V>
  MLP_EXT_HOST_DEVICE static V tanh_softplus(V z) {
    using std::exp;
    const V e = exp(where(V(20) < z, V(20), z)), n = e * (e + 2);
    return n / (n + 2);
  }
  template <class V>
  MLP_EXT_HOST_DEVICE V forward(V z) const {
    return z * tanh_softplus(z);
  }
  template <class V>
  MLP_EXT_HOST_DEVICE V backward(V dy, V z) const {
    const V t = tanh_softplus(z);
    return dy * (t + z * Sigmoid{}.forward(z) * (1 - t * t));
  }
  template <class Tensor>
  Tensor native(const Tensor& z) const {
    return mish(z);
  }
  template <class Tensor>
  Tensor native_backward(const Tensor& dy, const Tensor& z) const {
    const Tensor t = tanh(softplus(z));  // mish_backward has no derivative
    return dy * (t + z * sigmoid(z) * (1 - t * t));
  }
};

using Activations =
    TypeList<Identity, ReLU, Sigmoid, Tanh, LeakyReLU, ELU, SELU, SiLU, GELU, GELUTanh, Softplus, Hardtanh, Mish>;
struct Activation : Chosen<Activations> {
  using Chosen::Chosen;
  Activation() = default;
  Activation(const Chosen<Activations>& chosen) : Chosen(chosen) {}
};

inline Needs needs_of(const Activation& activation) {
  return visit(activation, [](auto act) { return act.needs(); });
}
inline bool is_identity(const Activation& activation) {
  return activation.index == index_of(Identity::name, Activations{});
}

// Any activation, dispatched at run time at every call.
struct AnyActivation {
  Activation chosen;
  MLP_EXT_HOST_DEVICE Needs needs() const {
    return visit(chosen, [](auto act) { return act.needs(); });
  }
  template <class V>
  MLP_EXT_HOST_DEVICE V forward(V z) const {
    return visit(chosen, [&](auto act) { return act.forward(z); });
  }
  template <class V>
  MLP_EXT_HOST_DEVICE V backward(V dy, V saved) const {
    return visit(chosen, [&](auto act) { return act.backward(dy, saved); });
  }
};

}  // namespace mlp_ext
