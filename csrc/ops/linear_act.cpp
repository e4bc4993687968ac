// The operator linear_act: schema, argument checks, calls through the dispatcher, and the composite of native
// operations that serves devices without kernels of ours.
#include "ops/linear_act.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sigmoid_backward.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/tanh_backward.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include "math/activations.h"
#include "ops/checks.h"

namespace mlp_ext {

namespace {

constexpr const char* kOp = "linear_act";

// torch's own operation where there is one, else the formula over tensors.
template <class Act>
at::Tensor activate(Act act, const at::Tensor& z) {
  if constexpr (requires { act.native(z); })
    return act.native(z);
  else
    return act.forward(z);
}
template <class Act>
at::Tensor activate_backward(Act act, const at::Tensor& dy, const at::Tensor& y) {
  if constexpr (requires { act.native_backward(dy, y); })
    return act.native_backward(dy, y);
  else
    return act.backward(dy, y);
}

}  // namespace

size_t check_linear_act(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                        std::string_view activation) {
  const size_t index = check_activation(kOp, activation, "activation");
  check_dtype(kOp, input, "input");
  check_like(kOp, weight, "weight", input, "input");
  TORCH_CHECK(input.dim() >= 1, "linear_act: input must be [*, K], got a 0-dimensional tensor");
  check_weight(kOp, weight, "weight");
  TORCH_SYM_CHECK(weight.sym_size(1).sym_eq(input.sym_size(-1)),
                  "linear_act: weight must be [N, K=", input.sym_size(-1), "] to match input ", input.sym_sizes(),
                  ", got ", weight.sym_sizes());
  if (bias) {
    check_like(kOp, *bias, "bias", input, "input");
    TORCH_CHECK(bias->dim() == 1, "linear_act: bias must be [N=", weight.sym_size(0), "], got ", bias->sym_sizes());
    TORCH_SYM_CHECK(bias->sym_size(0).sym_eq(weight.sym_size(0)), "linear_act: bias must be [N=", weight.sym_size(0),
                    "] to match weight ", weight.sym_sizes(), ", got ", bias->sym_sizes());
  }
  return index;
}

size_t check_linear_act_backward(const at::Tensor& grad_output, const std::optional<at::Tensor>& output,
                                 const std::optional<at::Tensor>& input, const std::optional<at::Tensor>& weight,
                                 std::string_view activation, std::array<bool, 3> output_mask) {
  const size_t index = check_activation(kOp, activation, "activation");
  const bool needs_output = visit_activation(index, [](auto act) { return act.saves == Saves::output; });
  check_dtype(kOp, grad_output, "grad_output");
  TORCH_CHECK(grad_output.dim() >= 1, "linear_act: grad_output must be [*, N], got a 0-dimensional tensor");
  TORCH_CHECK(output || !needs_output, "linear_act: output is needed for the gradient of ", activation);
  TORCH_CHECK(weight || !output_mask[0], "linear_act: weight is needed for the gradient of input");
  TORCH_CHECK(input || !output_mask[1], "linear_act: input is needed for the gradient of weight");
  if (output) {
    check_like(kOp, *output, "output", grad_output, "grad_output");
    TORCH_CHECK(output->sym_sizes() == grad_output.sym_sizes(), "linear_act: grad_output must be ", output->sym_sizes(),
                " to match output, got ", grad_output.sym_sizes());
  }
  if (weight) {
    check_like(kOp, *weight, "weight", grad_output, "grad_output");
    check_weight(kOp, *weight, "weight");
    TORCH_SYM_CHECK(weight->sym_size(0).sym_eq(grad_output.sym_size(-1)),
                    "linear_act: weight must be [N=", grad_output.sym_size(-1), ", K] to match grad_output ",
                    grad_output.sym_sizes(), ", got ", weight->sym_sizes());
  }
  if (input) {
    check_like(kOp, *input, "input", grad_output, "grad_output");
    TORCH_CHECK(input->dim() == grad_output.dim() && input->sym_sizes().slice(0, input->dim() - 1) ==
                                                         grad_output.sym_sizes().slice(0, grad_output.dim() - 1),
                "linear_act: input must be [*, K] with the leading sizes of grad_output ", grad_output.sym_sizes(),
                ", got ", input->sym_sizes());
  }
  if (input && weight)
    TORCH_SYM_CHECK(weight->sym_size(1).sym_eq(input->sym_size(-1)),
                    "linear_act: weight must be [N, K=", input->sym_size(-1), "] to match input ", input->sym_sizes(),
                    ", got ", weight->sym_sizes());
  return index;
}

at::Tensor linear_act(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                      std::string_view activation) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mlp_ext::linear_act", "").typed<decltype(linear_act)>();
  return op.call(input, weight, bias, activation);
}

Gradients linear_act_backward(const at::Tensor& grad_output, const std::optional<at::Tensor>& output,
                              const std::optional<at::Tensor>& input, const std::optional<at::Tensor>& weight,
                              std::string_view activation, std::array<bool, 3> output_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mlp_ext::_linear_act_backward", "")
                             .typed<decltype(linear_act_backward)>();
  return op.call(grad_output, output, input, weight, activation, output_mask);
}

// y = act(x W^T + b)
at::Tensor linear_act_native(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                             std::string_view activation) {
  const size_t index = check_linear_act(input, weight, bias, activation);
  const auto z = at::linear(input, weight, bias);
  return visit_activation(index, [&](auto act) { return activate(act, z); });
}

// dz = act'(dy, y);  dx = dz W  (*,N)(N,K);  dW = dz^T x  (N,M)(M,K);  db = sum over rows of dz
Gradients linear_act_backward_native(const at::Tensor& grad_output, const std::optional<at::Tensor>& output,
                                     const std::optional<at::Tensor>& input, const std::optional<at::Tensor>& weight,
                                     std::string_view activation, std::array<bool, 3> output_mask) {
  const size_t index = check_linear_act_backward(grad_output, output, input, weight, activation, output_mask);
  const auto rows = [](const at::Tensor& t) { return t.dim() == 1 ? t.unsqueeze(0) : t.flatten(0, -2); };
  const auto dz = visit_activation(
      index, [&](auto act) { return activate_backward(act, grad_output, output.value_or(at::Tensor())); });
  at::Tensor dx, dw, db;
  if (output_mask[0]) dx = at::matmul(dz, *weight);
  if (output_mask[1]) dw = at::matmul(rows(dz).t(), rows(*input));
  if (output_mask[2]) db = rows(dz).sum(0);
  return {dx, dw, db};
}

namespace {

// Shapes and dtypes alone, also with symbolic sizes: fake tensors and the meta device share the real checks.
at::Tensor linear_act_meta(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                           std::string_view activation) {
  check_linear_act(input, weight, bias, activation);
  auto sizes = input.sym_sizes().vec();
  sizes.back() = weight.sym_size(0);
  return at::empty_symint(sizes, input.options());
}

Gradients linear_act_backward_meta(const at::Tensor& grad_output, const std::optional<at::Tensor>& output,
                                   const std::optional<at::Tensor>& input, const std::optional<at::Tensor>& weight,
                                   std::string_view activation, std::array<bool, 3> output_mask) {
  check_linear_act_backward(grad_output, output, input, weight, activation, output_mask);
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
  m.def("linear_act(Tensor input, Tensor weight, Tensor? bias, str activation) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "_linear_act_backward(Tensor grad_output, Tensor? output, Tensor? input, Tensor? weight, str activation, "
      "bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(mlp_ext, CompositeExplicitAutograd, m) {
  m.impl("linear_act", linear_act_native);
  m.impl("_linear_act_backward", linear_act_backward_native);
}

TORCH_LIBRARY_IMPL(mlp_ext, Meta, m) {
  m.impl("linear_act", linear_act_meta);
  m.impl("_linear_act_backward", linear_act_backward_meta);
}

// Under vmap the native operations bring their own batching rules.
TORCH_LIBRARY_IMPL(mlp_ext, FuncTorchBatched, m) {
  m.impl("linear_act", linear_act_native);
  m.impl("_linear_act_backward", linear_act_backward_native);
}

}  // namespace mlp_ext
