// Nodes of torch's autograd graph for operators, written as those of torch's own operators are. A
// torch::autograd::Function is shorter to write, but what it keeps in maps and copies at every call is a quarter of a
// small stack's forward and backward.
#pragma once

#include <ATen/core/ivalue.h>
#include <torch/csrc/autograd/variable.h>

#include <vector>

namespace mlp_ext {

// How gradients go through an operator.
struct Derivative {
  const char* name;  // of the node
  // grads: of the outputs, undefined where none came. wanted: of which inputs. A gradient, or undefined, for each
  // input.
  torch::autograd::variable_list (*backward)(const torch::autograd::variable_list& grads,
                                             const torch::autograd::variable_list& saved,
                                             const c10::IValue& activations, const std::vector<bool>& wanted);
};

// Enters the outputs, fresh tensors, in the graph as results of the inputs. An input may be undefined, and so may be
// what is saved for backward.
void record(const Derivative& derivative, c10::IValue activations, const torch::autograd::variable_list& inputs,
            const torch::autograd::variable_list& outputs, const torch::autograd::variable_list& saved);

}  // namespace mlp_ext
