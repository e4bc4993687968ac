// Autograd nodes for our operators, written like those of torch's own operators: torch::autograd::Function is shorter
// to write, but its maps and copies take a quarter of the time of a small stack's forward and backward.
#pragma once

#include <torch/csrc/autograd/variable.h>

#include <vector>

#include "ops/mlp.h"

namespace mlp_ext {

// Non-tensor arguments of an operator's backward.
struct Settings {
  c10::IValue activations;         // a name, or Names
  std::vector<double> parameters;  // of the activations
};

// An operator's backward.
struct Derivative {
  const char* name;  // of the node
  // grads: of the outputs, may be undefined. needed: which inputs need gradients. Returns one gradient per input, or
  // undefined.
  torch::autograd::variable_list (*backward)(const torch::autograd::variable_list& grads,
                                             const torch::autograd::variable_list& saved, const Settings& settings,
                                             const std::vector<bool>& needed);
};

// Adds a node to the autograd graph that makes the (new) outputs from the inputs. Inputs and saved tensors may be
// undefined.
void record(const Derivative& derivative, Settings settings, const torch::autograd::variable_list& inputs,
            const torch::autograd::variable_list& outputs, const torch::autograd::variable_list& saved);

}  // namespace mlp_ext
