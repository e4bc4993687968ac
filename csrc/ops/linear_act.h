// The operator linear_act: interface of autograd and the backends.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "math/activations.h"

namespace mlp_ext {

// dx [*, K], dW [N, K], db [N]; undefined where output_mask is false
using LayerGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Outputs = std::tuple<at::Tensor, at::Tensor>;  // y [*, N], z [*, N]

// M of a tensor [*, columns].
inline int64_t leading_size(const at::Tensor& t) { return c10::multiply_integers(t.sizes().slice(0, t.dim() - 1)); }

using LinearActSignature = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                                      std::string_view, std::optional<at::ArrayRef<double>>);
// Makes a kernel of linear_act from a function whose parameters are not optional. (The operator's are: passing an empty
// list from Python would slow down small layers by 10 %.)
template <at::Tensor (*f)(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, std::string_view,
                          at::ArrayRef<double>)>
at::Tensor with_optional_parameters(const at::Tensor& input, const at::Tensor& weight,
                                    const std::optional<at::Tensor>& bias, std::string_view activation,
                                    std::optional<at::ArrayRef<double>> parameters) {
  return f(input, weight, bias, activation, parameters.value_or(at::ArrayRef<double>()));
}

// y = act(x W^T + b), through the dispatcher.
at::Tensor linear_act(const at::Tensor& input,                // [*, K]
                      const at::Tensor& weight,               // [N, K]
                      const std::optional<at::Tensor>& bias,  // [N]
                      std::string_view activation,            // a name in activations.h
                      at::ArrayRef<double> parameters);       // of the activation; empty: the defaults
// y and z = x W^T + b, for activations whose backward needs z.  Through the dispatcher.
Outputs linear_act_forward(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                           std::string_view activation, at::ArrayRef<double> parameters);
// dz = act'(dy, saved);  dx = dz W;  dW = dz^T x;  db = sum over rows of dz.  Through the dispatcher.
LayerGradients linear_act_backward(const at::Tensor& grad_output,            // [*, N]
                                   const std::optional<at::Tensor>& saved,   // y or z [*, N], what the activation needs
                                   const std::optional<at::Tensor>& input,   // [*, K], for dW
                                   const std::optional<at::Tensor>& weight,  // [N, K], for dx
                                   std::string_view activation, at::ArrayRef<double> parameters,
                                   std::array<bool, 3> output_mask);  // dx, dW, db

// The same as composites of native operations: the reference, and the fallback for devices without our kernels.
at::Tensor linear_act_native(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                             std::string_view activation, at::ArrayRef<double> parameters);
LayerGradients linear_act_backward_native(const at::Tensor& grad_output, const std::optional<at::Tensor>& saved,
                                          const std::optional<at::Tensor>& input,
                                          const std::optional<at::Tensor>& weight, std::string_view activation,
                                          at::ArrayRef<double> parameters, std::array<bool, 3> output_mask);

// By PyTorch's operations: act(z), and y = act(z) with z = x W^T + b.
at::Tensor activate(const Activation& activation, const at::Tensor& z);
Outputs linear_then_act(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                        const Activation& activation);

// Throw unless dtypes, devices and shapes fit; return the activation.
Activation check_linear_act(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                            std::string_view activation, at::ArrayRef<double> parameters);
Activation check_linear_act_backward(const at::Tensor& grad_output, const std::optional<at::Tensor>& saved,
                                     const std::optional<at::Tensor>& input, const std::optional<at::Tensor>& weight,
                                     std::string_view activation, at::ArrayRef<double> parameters,
                                     std::array<bool, 3> output_mask);

}  // namespace mlp_ext
