// Stochastic gradient descent as torch.optim.SGD does it.
#pragma once

#include "math/activations.h"

namespace mlp_ext {

// g = -g if maximize;  g += weight_decay p;  v = momentum v + (1 - dampening) g;  g = nesterov ? g + momentum v : v;
// p -= lr g.  In its first step torch takes v = g: the same as v = 0 and a dampening of 0.
struct Sgd {
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize;
  static constexpr size_t size = 6;  // hyperparameters

  template <class V>  // momentum_buffer: unused unless momentum
  MLP_EXT_HOST_DEVICE __attribute__((always_inline)) void update(V& parameter, V& momentum_buffer, V gradient) const {
    if (maximize) gradient = -gradient;
    if (weight_decay != 0) gradient = gradient + V(weight_decay) * parameter;
    if (momentum != 0) {
      momentum_buffer = V(momentum) * momentum_buffer + V(1 - dampening) * gradient;
      gradient = nesterov ? gradient + V(momentum) * momentum_buffer : momentum_buffer;
    }
    parameter = parameter - V(lr) * gradient;
  }
};

}  // namespace mlp_ext
