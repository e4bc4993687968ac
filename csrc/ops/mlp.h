// The operator mlp, a stack of linear_act layers: interface of autograd and the backends.
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

// An element by reference: get() copies the string.
inline std::string_view name_at(const Names& names, size_t l) { return static_cast<const std::string&>(names[l]); }

// The activation of a layer, as linear_act takes it.
struct LayerActivation {
  std::string_view name;
  Numbers parameters;
  Needs needs;
  size_t saved;  // index among mlp_forward's outputs of what backward needs: y or z
};
c10::SmallVector<LayerActivation, 8> layer_activations(const Names& activations, Numbers parameters);

// y_0 = x,  y_l = act_l(y_(l-1) W_l^T + b_l);  the last y.  Through the dispatcher.
at::Tensor mlp(const at::Tensor& input,        // [*, K]
               at::TensorList weights,         // [N_l, N_(l-1)] each, N_0 = K
               const OptionalTensors& biases,  // [N_l] each
               const Names& activations,       // names in activations.h
               Numbers parameters);            // of all activations, in order; empty: the defaults
// Forward of training: y of every layer, then z of each layer whose activation needs it.  Through the dispatcher.
std::vector<at::Tensor> mlp_forward(const at::Tensor& input, at::TensorList weights, const OptionalTensors& biases,
                                    const Names& activations, Numbers parameters);
// The gradients selected by output_mask, in its order.  Through the dispatcher.
std::vector<at::Tensor> mlp_backward(const OptionalTensors& grad_outputs,     // as `outputs`; the last y's is required
                                     const std::optional<at::Tensor>& input,  // [*, K], for dW_1
                                     const OptionalTensors& weights,          // [N_l, N_(l-1)] each, for dy_(l-1)
                                     const OptionalTensors& outputs,          // of mlp_forward, for dz_l and dW_(l+1)
                                     const Names& activations, Numbers parameters,
                                     const c10::List<bool>& output_mask);  // dx, dW_1 .. dW_L, db_1 .. db_L

// The same as a loop over linear_act and its backward, through the dispatcher: the stack then gets every device's
// kernels, second derivatives and functorch transforms from the single layer.
at::Tensor mlp_loop(const at::Tensor& input, at::TensorList weights, const OptionalTensors& biases,
                    const Names& activations, Numbers parameters);
std::vector<at::Tensor> mlp_forward_loop(const at::Tensor& input, at::TensorList weights, const OptionalTensors& biases,
                                         const Names& activations, Numbers parameters);
std::vector<at::Tensor> mlp_backward_loop(const OptionalTensors& grad_outputs, const std::optional<at::Tensor>& input,
                                          const OptionalTensors& weights, const OptionalTensors& outputs,
                                          const Names& activations, Numbers parameters,
                                          const c10::List<bool>& output_mask);

}  // namespace mlp_ext
