// The operator mlp, a stack of linear_act: what autograd and others share.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "math/activations.h"

namespace mlp_ext {

using OptionalTensors = c10::List<std::optional<at::Tensor>>;
using Names = c10::List<std::string>;
using Numbers = at::ArrayRef<double>;

// The element itself: get() copies a string.
inline std::string_view name_at(const Names& names, size_t l) { return static_cast<const std::string&>(names[l]); }

// The activation of a layer, as linear_act takes it.
struct LayerActivation {
  std::string_view name;
  Numbers parameters;
  Needs needs;
  size_t saved;  // the index among the outputs of mlp_forward of what its backward needs: its y or its z
};
c10::SmallVector<LayerActivation, 8> layer_activations(const Names& activations, Numbers parameters);

// y_0 = x,  y_l = act_l(y_(l-1) W_l^T + b_l);  the last y.  Through the dispatcher.
at::Tensor mlp(const at::Tensor& input,        // [*, K]
               at::TensorList weights,         // [N_l, N_(l-1)] each, N_0 = K
               const OptionalTensors& biases,  // [N_l] each
               const Names& activations,       // names in activations.h
               Numbers parameters);            // of all activations, in order; empty: the defaults
// What training keeps: the y of every layer, and then the z of each whose activation needs it.  Through the dispatcher.
std::vector<at::Tensor> mlp_forward(const at::Tensor& input, at::TensorList weights, const OptionalTensors& biases,
                                    const Names& activations, Numbers parameters);
// The gradients that output_mask asks for, in its order.  Through the dispatcher.
std::vector<at::Tensor> mlp_backward(const OptionalTensors& grad_outputs,     // of `outputs`, the last y's given
                                     const std::optional<at::Tensor>& input,  // [*, K], for dW_1
                                     const OptionalTensors& weights,          // [N_l, N_(l-1)] each, for dy_(l-1)
                                     const OptionalTensors& outputs,          // of mlp_forward, for dz_l and dW_(l+1)
                                     const Names& activations, Numbers parameters,
                                     const c10::List<bool>& output_mask);  // dx, dW_1 .. dW_L, db_1 .. db_L

// The same as a loop of linear_act and its backward, each through the dispatcher: so every device's kernels, and
// second derivatives and functorch's transforms of one layer, serve the stack.
at::Tensor mlp_loop(const at::Tensor& input, at::TensorList weights, const OptionalTensors& biases,
                    const Names& activations, Numbers parameters);
std::vector<at::Tensor> mlp_forward_loop(const at::Tensor& input, at::TensorList weights, const OptionalTensors& biases,
                                         const Names& activations, Numbers parameters);
std::vector<at::Tensor> mlp_backward_loop(const OptionalTensors& grad_outputs, const std::optional<at::Tensor>& input,
                                          const OptionalTensors& weights, const OptionalTensors& outputs,
                                          const Names& activations, Numbers parameters,
                                          const c10::List<bool>& output_mask);

}  // namespace mlp_ext
