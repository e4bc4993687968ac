// Nodes of torch's autograd graph for operators, written as those of torch's own operators are. A
// torch::autograd::Function is shorter to write, but what it keeps in maps and copies at every call is a quarter of a
// small stack's forward and backward.
#pragma once

#include <torch/csrc/autograd/variable.h>

#include <vector>

#include "ops/mlp.h"

namespace mlp_ext {

// What an operator's backward depends on beside tensors.
struct Settings {
  c10::IValue activations;         // a name, or Names
  std::vector<double> parameters;  // of the activations
};

// How gradients go through an operator.
struct Derivative {
  const char* name;  // of the node
  // grads: of the outputs, undefined where none came. wanted: of which inputs. A gradient, or undefined, for each
  // input.
  torch::autograd::variable_list (*backward)(const torch::autograd::variable_list& grads,
                                             const torch::autograd::variable_list& saved, const Settings& settings,
                                             const std::vector<bool>& wanted);
};

// Enters the outputs, fresh tensors, in the graph as results of the inputs. An input may be undefined, and so may be
// what is saved for backward.
void record(const Derivative& derivative, Settings settings, const torch::autograd::variable_list& inputs,
            const torch::autograd::variable_list& outputs, const torch::autograd::variable_list& saved);

}  // namespace mlp_ext
