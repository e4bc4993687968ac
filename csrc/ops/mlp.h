// The operator mlp, a stack of linear_act: what autograd and others share.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace mlp_ext {

using OptionalTensors = c10::List<std::optional<at::Tensor>>;
using Names = c10::List<std::string>;

// The element itself: get() copies a string.
inline std::string_view name_at(const Names& names, size_t l) { return static_cast<const std::string&>(names[l]); }

// y_0 = x,  y_l = act_l(y_(l-1) W_l^T + b_l);  the last y.  Through the dispatcher.
at::Tensor mlp(const at::Tensor& input,        // [*, K]
               at::TensorList weights,         // [N_l, N_(l-1)] each, N_0 = K
               const OptionalTensors& biases,  // [N_l] each
               const Names& activations);      // names in activations.h
// The y of every layer, the last one last: what training keeps.  Through the dispatcher.
std::vector<at::Tensor> mlp_forward(const at::Tensor& input, at::TensorList weights, const OptionalTensors& biases,
                                    const Names& activations);
// The gradients that output_mask asks for, in its order.  Through the dispatcher.
std::vector<at::Tensor> mlp_backward(const OptionalTensors& grad_outputs,     // [*, N_l] each, the last one given
                                     const std::optional<at::Tensor>& input,  // [*, K], for dW_1
                                     const OptionalTensors& weights,          // [N_l, N_(l-1)] each, for dy_(l-1)
                                     const OptionalTensors& outputs,          // [*, N_l] each, for dz_l and dW_(l+1)
                                     const Names& activations,
                                     const c10::List<bool>& output_mask);  // dx, dW_1 .. dW_L, db_1 .. db_L

// The same as a loop of linear_act and its backward, each through the dispatcher: so every device's kernels, and
// second derivatives and functorch's transforms of one layer, serve the stack.
at::Tensor mlp_loop(const at::Tensor& input, at::TensorList weights, const OptionalTensors& biases,
                    const Names& activations);
std::vector<at::Tensor> mlp_forward_loop(const at::Tensor& input, at::TensorList weights, const OptionalTensors& biases,
                                         const Names& activations);
std::vector<at::Tensor> mlp_backward_loop(const OptionalTensors& grad_outputs, const std::optional<at::Tensor>& input,
                                          const OptionalTensors& weights, const OptionalTensors& outputs,
                                          const Names& activations, const c10::List<bool>& output_mask);

}  // namespace mlp_ext
