// The operator linear_act: schema, argument checks, dispatcher calls, and the composite of native operations for
// devices without our kernels.
#include "ops/linear_act.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/elu.h>
#include <ATen/ops/elu_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/hardtanh.h>
#include <ATen/ops/hardtanh_backward.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/leaky_relu_backward.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mish.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/selu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sigmoid_backward.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/softplus_backward.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/tanh_backward.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include "ops/checks.h"

namespace mlp_ext {

namespace {

constexpr const char* kLinearAct = "linear_act";

}  // namespace

// PyTorch's own operation if there is one, else the formula on tensors.
at::Tensor activate(const Activation& activation, const at::Tensor& z) {
  return visit(activation, [&](auto act) {
    if constexpr (requires { act.native(z); })
      return act.native(z);
    else
      return act.forward(z);
  });
}

Outputs linear_then_act(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                        const Activation& activation) {
  const at::Tensor z = at::linear(input, weight, bias);
  return {activate(activation, z), z};
}

namespace {

at::Tensor activate_backward(const Activation& activation, const at::Tensor& dy, const at::Tensor& saved) {
  return visit(activation, [&](auto act) {
    if constexpr (requires { act.native_backward(dy, saved); })
      return act.native_backward(dy, saved);
    else
      return act.backward(dy, saved);
  });
}

}  // namespace

Activation check_linear_act(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                            std::string_view activation, at::ArrayRef<double> parameters) {
  const Activation act = check_activation(kLinearAct, activation, parameters, "activation");
  check_dtype(kLinearAct, input, "input");
  check_like(kLinearAct, weight, "weight", input, "input");
  TORCH_CHECK(input.dim() >= 1, "linear_act: input must be [*, K], got a 0-dimensional tensor");
  check_layer(kLinearAct, weight, "weight", bias, "bias", input, input.sym_size(-1), "input ", input.sym_sizes());
  return act;
}

Activation check_linear_act_backward(const at::Tensor& grad_output, const std::optional<at::Tensor>& saved,
                                     const std::optional<at::Tensor>& input, const std::optional<at::Tensor>& weight,
                                     std::string_view activation, at::ArrayRef<double> parameters,
                                     std::array<bool, 3> output_mask) {
  const Activation act = check_activation(kLinearAct, activation, parameters, "activation");
  check_dtype(kLinearAct, grad_output, "grad_output");
  TORCH_CHECK(grad_output.dim() >= 1, "linear_act: grad_output must be [*, N], got a 0-dimensional tensor");
  TORCH_CHECK(saved || needs_of(act) == Needs::nothing, "linear_act: saved is needed for the gradient of ", activation);
  TORCH_CHECK(weight || !output_mask[0], "linear_act: weight is needed for the gradient of input");
  TORCH_CHECK(input || !output_mask[1], "linear_act: input is needed for the gradient of weight");
  if (saved) {
    check_like(kLinearAct, *saved, "saved", grad_output, "grad_output");
    TORCH_CHECK(saved->sym_sizes() == grad_output.sym_sizes(), "linear_act: grad_output must be ", saved->sym_sizes(),
                " to match saved, got ", grad_output.sym_sizes());
  }
  if (weight) {
    check_same_kind(kLinearAct, *weight, "weight", grad_output, "grad_output");
    TORCH_CHECK(weight->dim() == 2, "linear_act: weight must be [N, K], got ", weight->sym_sizes());
    TORCH_SYM_CHECK(weight->sym_size(0).sym_eq(grad_output.sym_size(-1)),
                    "linear_act: weight must be [N=", grad_output.sym_size(-1), ", K] to match grad_output ",
                    grad_output.sym_sizes(), ", got ", weight->sym_sizes());
  }
  if (input) {
    check_same_kind(kLinearAct, *input, "input", grad_output, "grad_output");
    TORCH_CHECK(input->dim() == grad_output.dim() && input->sym_sizes().slice(0, input->dim() - 1) ==
                                                         grad_output.sym_sizes().slice(0, grad_output.dim() - 1),
                "linear_act: input must be [*, K] with the leading sizes of grad_output ", grad_output.sym_sizes(),
                ", got ", input->sym_sizes());
  }
  if (input && weight)
    TORCH_SYM_CHECK(weight->sym_size(1).sym_eq(input->sym_size(-1)),
                    "linear_act: weight must be [N, K=", input->sym_size(-1), "] to match input ", input->sym_sizes(),
                    ", got ", weight->sym_sizes());
  if (output_mask[0]) check_allocated(kLinearAct, *weight, "weight");
  if (output_mask[1]) check_allocated(kLinearAct, *input, "input");
  return act;
}

at::Tensor linear_act(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                      std::string_view activation, at::ArrayRef<double> parameters) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mlp_ext::linear_act", "").typed<LinearActSignature>();
  return op.call(input, weight, bias, activation, parameters);
}

Outputs linear_act_forward(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                           std::string_view activation, at::ArrayRef<double> parameters) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mlp_ext::_linear_act_forward", "")
                             .typed<decltype(linear_act_forward)>();
  return op.call(input, weight, bias, activation, parameters);
}

LayerGradients linear_act_backward(const at::Tensor& grad_output, const std::optional<at::Tensor>& saved,
                                   const std::optional<at::Tensor>& input, const std::optional<at::Tensor>& weight,
                                   std::string_view activation, at::ArrayRef<double> parameters,
                                   std::array<bool, 3> output_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mlp_ext::_linear_act_backward", "")
                             .typed<decltype(linear_act_backward)>();
  return op.call(grad_output, saved, input, weight, activation, parameters, output_mask);
}

// y = act(x W^T + b)
at::Tensor linear_act_native(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                             std::string_view activation, at::ArrayRef<double> parameters) {
  const Activation act = check_linear_act(input, weight, bias, activation, parameters);
  return activate(act, at::linear(input, weight, bias));
}

// dz = act'(dy, saved);  dx = dz W  (*,N)(N,K);  dW = dz^T x  (N,M)(M,K);  db = sum over rows of dz
LayerGradients linear_act_backward_native(const at::Tensor& grad_output, const std::optional<at::Tensor>& saved,
                                          const std::optional<at::Tensor>& input,
                                          const std::optional<at::Tensor>& weight, std::string_view activation,
                                          at::ArrayRef<double> parameters, std::array<bool, 3> output_mask) {
  const Activation act =
      check_linear_act_backward(grad_output, saved, input, weight, activation, parameters, output_mask);
  const auto rows = [](const at::Tensor& t) { return t.dim() == 1 ? t.unsqueeze(0) : t.flatten(0, -2); };
  const at::Tensor dz = activate_backward(act, grad_output, saved.value_or(at::Tensor()));
  at::Tensor dx, dw, db;
  if (output_mask[0]) dx = at::matmul(dz, *weight);
  if (output_mask[1]) dw = at::matmul(rows(dz).t(), rows(*input));
  if (output_mask[2]) db = rows(dz).sum(0);
  return {dx, dw, db};
}

namespace {

Outputs linear_act_forward_native(const at::Tensor& input, const at::Tensor& weight,
                                  const std::optional<at::Tensor>& bias, std::string_view activation,
                                  at::ArrayRef<double> parameters) {
  return linear_then_act(input, weight, bias, check_linear_act(input, weight, bias, activation, parameters));
}

// Meta kernels: the real checks on shapes and dtypes, with symbolic sizes.
at::Tensor linear_act_meta(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                           std::string_view activation, at::ArrayRef<double> parameters) {
  check_linear_act(input, weight, bias, activation, parameters);
  auto sizes = input.sym_sizes().vec();
  sizes.back() = weight.sym_size(0);
  return at::empty_symint(sizes, input.options());
}

Outputs linear_act_forward_meta(const at::Tensor& input, const at::Tensor& weight,
                                const std::optional<at::Tensor>& bias, std::string_view activation,
                                at::ArrayRef<double> parameters) {
  const at::Tensor y = linear_act_meta(input, weight, bias, activation, parameters);
  return {y, at::empty_like(y)};
}

LayerGradients linear_act_backward_meta(const at::Tensor& grad_output, const std::optional<at::Tensor>& saved,
                                        const std::optional<at::Tensor>& input, const std::optional<at::Tensor>& weight,
                                        std::string_view activation, at::ArrayRef<double> parameters,
                                        std::array<bool, 3> output_mask) {
  check_linear_act_backward(grad_output, saved, input, weight, activation, parameters, output_mask);
  at::Tensor dx, dw, db;
  const auto options = grad_output.options();
  if (output_mask[0]) {
    auto sizes = grad_output.sym_sizes().vec();
    sizes.back() = weight->sym_size(1);
    dx = at::empty_symint(sizes, options);
  }
  if (output_mask[1]) dw = at::empty_symint({grad_output.sym_size(-1), input->sym_size(-1)}, options);
  if (output_mask[2]) db = at::empty_symint({grad_output.sym_size(-1)}, options);
  return {dx, dw, db};
}

}  // namespace

TORCH_LIBRARY(mlp_ext, m) {
  m.def("linear_act(Tensor input, Tensor weight, Tensor? bias, str activation, float[]? parameters=None) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "_linear_act_forward(Tensor input, Tensor weight, Tensor? bias, str activation, float[] parameters=[]) -> "
      "(Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_linear_act_backward(Tensor grad_output, Tensor? saved, Tensor? input, Tensor? weight, str activation, "
      "float[] parameters, bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(mlp_ext, CompositeExplicitAutograd, m) {
  m.impl("linear_act", with_optional_parameters<linear_act_native>);
  m.impl("_linear_act_forward", linear_act_forward_native);
  m.impl("_linear_act_backward", linear_act_backward_native);
}

TORCH_LIBRARY_IMPL(mlp_ext, Meta, m) {
  m.impl("linear_act", with_optional_parameters<linear_act_meta>);
  m.impl("_linear_act_forward", linear_act_forward_meta);
  m.impl("_linear_act_backward", linear_act_backward_meta);
}

// vmap uses the batching rules of the native operations.
TORCH_LIBRARY_IMPL(mlp_ext, FuncTorchBatched, m) {
  m.impl("linear_act", with_optional_parameters<linear_act_native>);
  m.impl("_linear_act_forward", linear_act_forward_native);
  m.impl("_linear_act_backward", linear_act_backward_native);
}

}  // namespace mlp_ext
