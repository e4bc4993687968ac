// Autograd and autocast of the operators: forward directly above backward.
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "activations.h"
#include "linear_act.h"

namespace mlp_ext {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct LinearAct : torch::autograd::Function<LinearAct> {
  static constexpr bool is_traceable = true;

  // y = act(x W^T + b). Saves what backward reads, and no more: x for dW, W for dx, y for dz.
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                        const std::optional<Tensor>& bias, std::string_view activation) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    const Tensor output = linear_act(input, weight, bias, activation);
    const bool saves_output =
        visit_activation(activation_index(activation), [](auto act) { return act.saves == Saves::output; });
    ctx->save_for_backward({saves_output ? output : Tensor(), weight.requires_grad() ? input : Tensor(),
                            input.requires_grad() ? weight : Tensor()});
    ctx->saved_data["activation"] = std::string(activation);
    ctx->saved_data["has_bias"] = bias.has_value();
    return output;
  }

  // dz = act'(dy, y);  dx = dz W;  dW = dz^T x;  db = sum over rows of dz
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto optional = [](const Tensor& t) { return t.defined() ? std::optional<Tensor>(t) : std::nullopt; };
    const bool needs_db = ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(2);
    const auto [dx, dw, db] = linear_act_backward(grads[0], optional(saved[0]), optional(saved[1]), optional(saved[2]),
                                                  ctx->saved_data["activation"].toStringView(),
                                                  {ctx->needs_input_grad(0), ctx->needs_input_grad(1), needs_db});
    return {dx, dw, db, Tensor()};
  }
};

// Function supports neither functorch transforms nor forward-mode derivatives; native operations do.
bool needs_native(std::initializer_list<const Tensor*> tensors) {
  if (c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode)) return true;
  return std::any_of(tensors.begin(), tensors.end(),
                     [](const Tensor* t) { return t && t->defined() && t->_fw_grad(0).defined(); });
}

bool any_requires_grad(std::initializer_list<const Tensor*> tensors) {
  return at::GradMode::is_enabled() &&
         std::any_of(tensors.begin(), tensors.end(), [](const Tensor* t) { return t && t->requires_grad(); });
}

const Tensor* pointer(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }

Tensor linear_act_autograd(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                           std::string_view activation) {
  if (needs_native({&input, &weight, pointer(bias)})) return linear_act_native(input, weight, bias, activation);
  if (any_requires_grad({&input, &weight, pointer(bias)})) return LinearAct::apply(input, weight, bias, activation);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return linear_act(input, weight, bias, activation);
}

// Second derivatives come from the native operations of the composite.
Gradients linear_act_backward_autograd(const Tensor& grad_output, const std::optional<Tensor>& output,
                                       const std::optional<Tensor>& input, const std::optional<Tensor>& weight,
                                       std::string_view activation, std::array<bool, 3> output_mask) {
  const auto tensors = {&grad_output, pointer(output), pointer(input), pointer(weight)};
  if (needs_native(tensors) || any_requires_grad(tensors))
    return linear_act_backward_native(grad_output, output, input, weight, activation, output_mask);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return linear_act_backward(grad_output, output, input, weight, activation, output_mask);
}

// As nn.Linear: floating-point tensors other than float64 are cast to the dtype of the active autocast.
template <c10::DeviceType device>
Tensor linear_act_autocast(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                           std::string_view activation) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const auto cast = [dtype = at::autocast::get_autocast_dtype(device)](const auto& t) {
    return at::autocast::cached_cast(dtype, t, device);
  };
  return linear_act(cast(input), cast(weight), cast(bias), activation);
}

}  // namespace

TORCH_LIBRARY_IMPL(mlp_ext, Autograd, m) {
  m.impl("linear_act", linear_act_autograd);
  m.impl("_linear_act_backward", linear_act_backward_autograd);
}

TORCH_LIBRARY_IMPL(mlp_ext, AutocastCPU, m) { m.impl("linear_act", linear_act_autocast<c10::kCPU>); }
TORCH_LIBRARY_IMPL(mlp_ext, AutocastCUDA, m) { m.impl("linear_act", linear_act_autocast<c10::kCUDA>); }

}  // namespace mlp_ext
