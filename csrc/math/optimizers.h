// Optimizers: update rules with the hyperparameters and states of torch.optim.
//
// One functor serves scalars, CPU vectors, CUDA threads and, as a composite of PyTorch's operations, at::Tensor. V
// needs + - * /, < <=, where() and sqrt(); constants K are V, or double if V is a tensor. A Setting is a
// hyperparameter: double, or a double for each lane of V, for networks in lanes. begin_step computes the members after
// the hyperparameters once per step, as Number: a Setting, or a tensor if the step count is a tensor on a device.
#pragma once

#include <cmath>

#include "math/type_list.h"

namespace mlp_ext {

constexpr size_t kMaxStates = 3;  // tensors per parameter, apart from the step count

// A result of begin_step as an operand of V.
template <class V, class Number>
MLP_EXT_HOST_DEVICE auto beside(const Number& number) {
  if constexpr (std::is_constructible_v<Constant<V>, Number>)
    return Constant<V>(number);
  else
    return number;
}

// g = -g if maximize;  g += weight_decay p;  v = momentum v + (1 - dampening) g;  g = nesterov ? g + momentum v : v;
// p -= lr g.  PyTorch's first step takes v = g: here v = 0 and dampening = 0.
// (Sutskever et al., ICML 2013)
template <class Setting = double>
struct SGD {
  static constexpr const char* name = "sgd";
  static constexpr Parameters<6> parameters{
      {{"lr", 1e-3}, {"momentum", 0}, {"dampening", 0}, {"weight_decay", 0}, {"nesterov", 0}, {"maximize", 0}}};
  static constexpr std::array states{"momentum_buffer"};
  static constexpr bool counts_steps = false;
  Setting lr, momentum, dampening, weight_decay;
  bool nesterov, maximize;
  bool has_state(size_t) const { return momentum != 0; }
  MLP_EXT_HOST_DEVICE void begin_step(const Setting&) {}

  template <class V>
  MLP_EXT_HOST_DEVICE void update(V& parameter, V* state, V gradient) const {
    using K = Constant<V>;
    V& momentum_buffer = state[0];
    if (maximize) gradient = -gradient;
    if (weight_decay != 0) gradient = gradient + K(weight_decay) * parameter;
    if (momentum != 0) {
      momentum_buffer = K(momentum) * momentum_buffer + K(1 - dampening) * gradient;
      gradient = nesterov ? gradient + K(momentum) * momentum_buffer : momentum_buffer;
    }
    parameter = parameter - K(lr) * gradient;
  }
};

// m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  p -= lr m^ / (sqrt(v^) + eps) with m^ = m / (1 - b1^t) and
// v^ = v / (1 - b2^t), or the largest so far with amsgrad.  weight_decay adds to g or, decoupled as in AdamW, shrinks
// p. (Kingma and Ba, ICLR 2015; Reddi et al., ICLR 2018; Loshchilov and Hutter, ICLR 2019)
template <class Setting = double, class Number = Setting>
struct Adam {
  static constexpr const char* name = "adam";
  static constexpr Parameters<8> parameters{{{"lr", 1e-3},
                                             {"betas[0]", 0.9},
                                             {"betas[1]", 0.999},
                                             {"eps", 1e-8},
                                             {"weight_decay", 0},
                                             {"amsgrad", 0},
                                             {"maximize", 0},
                                             {"decoupled_weight_decay", 0}}};
  static constexpr std::array states{"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
  static constexpr bool counts_steps = true;
  Setting lr, beta1, beta2, eps, weight_decay;
  bool amsgrad, maximize, decoupled_weight_decay;
  Number step_size{}, root_correction{};  // lr / (1 - b1^t), sqrt(1 - b2^t)
  bool has_state(size_t i) const { return i < 2 || amsgrad; }
  MLP_EXT_HOST_DEVICE void begin_step(const Number& t) {
    using std::pow;
    using std::sqrt;
    step_size = lr / (1 - pow(beta1, t));
    root_correction = sqrt(1 - pow(beta2, t));
  }

  template <class V>
  MLP_EXT_HOST_DEVICE void update(V& parameter, V* state, V gradient) const {
    using K = Constant<V>;
    using std::sqrt;
    V &m = state[0], &v = state[1], &most = state[2];
    if (maximize) gradient = -gradient;
    if (weight_decay != 0) {
      if (decoupled_weight_decay)
        parameter = parameter * K(1 - lr * weight_decay);
      else
        gradient = gradient + K(weight_decay) * parameter;
    }
    m = m + K(1 - beta1) * (gradient - m);
    v = K(beta2) * v + K(1 - beta2) * gradient * gradient;
    if (amsgrad) most = where(v <= most, most, v);
    const V root = sqrt(amsgrad ? most : v) / beside<V>(root_correction) + K(eps);
    parameter = parameter - beside<V>(step_size) * (m / root);
  }
};

// v = alpha v + (1 - alpha) g^2;  g /= sqrt(v - a^2) + eps with a = 0 or, centered, a = alpha a + (1 - alpha) g;
// b = momentum b + g;  p -= lr b.   (Tieleman and Hinton, 2012; Graves, 2013)
template <class Setting = double>
struct RMSprop {
  static constexpr const char* name = "rmsprop";
  static constexpr Parameters<7> parameters{{{"lr", 1e-2},
                                             {"alpha", 0.99},
                                             {"eps", 1e-8},
                                             {"weight_decay", 0},
                                             {"momentum", 0},
                                             {"centered", 0},
                                             {"maximize", 0}}};
  static constexpr std::array states{"square_avg", "momentum_buffer", "grad_avg"};
  static constexpr bool counts_steps = true;
  Setting lr, alpha, eps, weight_decay, momentum;
  bool centered, maximize;
  bool has_state(size_t i) const { return i == 0 || (i == 1 ? momentum > 0 : centered); }
  MLP_EXT_HOST_DEVICE void begin_step(const Setting&) {}

  template <class V>
  MLP_EXT_HOST_DEVICE void update(V& parameter, V* state, V gradient) const {
    using K = Constant<V>;
    using std::sqrt;
    V &square = state[0], &momentum_buffer = state[1], &mean = state[2];
    if (maximize) gradient = -gradient;
    if (weight_decay != 0) gradient = gradient + K(weight_decay) * parameter;
    square = K(alpha) * square + K(1 - alpha) * gradient * gradient;
    V variance = square;
    if (centered) {
      mean = mean + K(1 - alpha) * (gradient - mean);
      variance = square - mean * mean;
      variance = where(variance < 0, 0, variance);  // rounded states: torch's root is NaN
    }
    const V root = sqrt(variance) + K(eps);
    if (momentum > 0) {
      momentum_buffer = K(momentum) * momentum_buffer + gradient / root;
      parameter = parameter - K(lr) * momentum_buffer;
    } else {
      parameter = parameter - K(lr) * (gradient / root);
    }
  }
};

// s += g^2;  p -= lr / (1 + (t - 1) lr_decay) g / (sqrt(s) + eps)   (Duchi et al., JMLR 2011)
template <class Setting = double, class Number = Setting>
struct Adagrad {
  static constexpr const char* name = "adagrad";
  static constexpr Parameters<5> parameters{
      {{"lr", 1e-2}, {"lr_decay", 0}, {"weight_decay", 0}, {"eps", 1e-10}, {"maximize", 0}}};
  static constexpr std::array states{"sum"};
  static constexpr bool counts_steps = true;
  Setting lr, lr_decay, weight_decay, eps;
  bool maximize;
  Number step_size{};
  bool has_state(size_t) const { return true; }
  MLP_EXT_HOST_DEVICE void begin_step(const Number& t) { step_size = lr / (1 + (t - 1) * lr_decay); }

  template <class V>
  MLP_EXT_HOST_DEVICE void update(V& parameter, V* state, V gradient) const {
    using K = Constant<V>;
    using std::sqrt;
    V& sum = state[0];
    if (maximize) gradient = -gradient;
    if (weight_decay != 0) gradient = gradient + K(weight_decay) * parameter;
    sum = sum + gradient * gradient;
    parameter = parameter - beside<V>(step_size) * (gradient / (sqrt(sum) + K(eps)));
  }
};

// gradient += scale g;  p stays.  For updates that follow later: of several steps, or after clipping or averaging.
template <class Setting = double>
struct Accumulate {
  static constexpr const char* name = "accumulate";
  static constexpr Parameters<1> parameters{{{"scale", 1}}};
  static constexpr std::array states{"gradient"};
  static constexpr bool counts_steps = false;
  Setting scale;
  bool has_state(size_t) const { return true; }
  MLP_EXT_HOST_DEVICE void begin_step(const Setting&) {}

  template <class V>
  MLP_EXT_HOST_DEVICE void update(V&, V* state, V gradient) const {
    using K = Constant<V>;
    state[0] = state[0] + K(scale) * gradient;
  }
};

using Optimizers = TypeList<SGD<>, Adam<>, RMSprop<>, Adagrad<>, Accumulate<>>;
struct Optimizer : Chosen<Optimizers> {
  using Chosen::Chosen;
  Optimizer() = default;
  Optimizer(const Chosen<Optimizers>& chosen) : Chosen(chosen) {}
};

// The optimizer ready for its step t, counted from 1.
MLP_EXT_HOST_DEVICE Optimizer at_step(const Optimizer& optimizer, double t) {
  return visit(optimizer, [&](auto o) {
    o.begin_step(t);
    return Optimizer(optimizer.index, o);
  });
}

}  // namespace mlp_ext
