// Autograd and autocast of the operators, forward above backward.
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "ops/checks.h"
#include "ops/linear_act.h"
#include "ops/mlp.h"
#include "ops/node.h"

namespace mlp_ext {
namespace {

using at::Tensor;
using torch::autograd::variable_list;

Tensor linear_act_below_autograd(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                 std::string_view activation, Numbers parameters) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return linear_act(input, weight, bias, activation, parameters);
}
Outputs linear_act_forward_below_autograd(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                          std::string_view activation, Numbers parameters) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return linear_act_forward(input, weight, bias, activation, parameters);
}

std::optional<Tensor> optional(const Tensor& t) { return t.defined() ? std::optional<Tensor>(t) : std::nullopt; }

Needs needs_of(std::string_view activation, Numbers parameters) {
  return mlp_ext::needs_of(check_activation("linear_act", activation, parameters, "activation"));
}

// If backward needs z, it is a hidden second output of the node: saved as an output, it carries second derivatives.
struct LinearAct {
  // y = act(x W^T + b). Saves only what backward reads: x for dW, W for dx, y or z for dz.
  static Outputs forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                         std::string_view activation, Numbers parameters) {
    const Needs needs = needs_of(activation, parameters);
    Outputs outputs;
    auto& [y, z] = outputs;
    if (needs == Needs::preactivation)
      outputs = linear_act_forward_below_autograd(input, weight, bias, activation, parameters);
    else
      y = linear_act_below_autograd(input, weight, bias, activation, parameters);
    variable_list results{y};
    if (z.defined()) results.push_back(z);
    record(kDerivative, {std::string(activation), parameters.vec()}, {input, weight, bias.value_or(Tensor())}, results,
           {needs == Needs::nothing ? Tensor() : results.back(), weight.requires_grad() ? input : Tensor(),
            input.requires_grad() ? weight : Tensor()});
    return outputs;
  }

  // dz = act'(dy, saved);  dx = dz W;  dW = dz^T x;  db = sum over rows of dz.  A gradient of z is added to dz.
  static variable_list backward(const variable_list& grads, const variable_list& saved, const Settings& settings,
                                const std::vector<bool>& needed) {
    variable_list result(needed.size());
    const auto add = [&](const Tensor& grad, std::string_view activation, Numbers parameters) {
      if (!grad.defined()) return;
      const auto [dx, dw, db] = linear_act_backward(grad, optional(saved[0]), optional(saved[1]), optional(saved[2]),
                                                    activation, parameters, {needed[0], needed[1], needed[2]});
      size_t i = 0;
      for (const Tensor& t : {dx, dw, db}) {
        Tensor& sum = result[i++];
        if (t.defined()) sum = sum.defined() ? sum + t : t;
      }
    };
    add(grads[0], settings.activations.toStringView(), settings.parameters);
    if (grads.size() > 1) add(grads[1], Identity::name, {});
    return result;
  }

  static constexpr Derivative kDerivative{"LinearActBackward", backward};
};

// Our node supports neither functorch transforms nor forward-mode AD; the native composite does.
bool needs_native(c10::ArrayRef<const Tensor*> tensors) {
  if (c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode)) return true;
  return std::any_of(tensors.begin(), tensors.end(),
                     [](const Tensor* t) { return t && t->defined() && t->_fw_grad(0).defined(); });
}

bool any_requires_grad(c10::ArrayRef<const Tensor*> tensors) {
  return at::GradMode::is_enabled() &&
         std::any_of(tensors.begin(), tensors.end(), [](const Tensor* t) { return t && t->requires_grad(); });
}

const Tensor* pointer(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }

Tensor linear_act_autograd(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                           std::string_view activation, Numbers parameters) {
  if (needs_native({&input, &weight, pointer(bias)}))
    return linear_act_native(input, weight, bias, activation, parameters);
  if (any_requires_grad({&input, &weight, pointer(bias)}))
    return std::get<0>(LinearAct::forward(input, weight, bias, activation, parameters));
  return linear_act_below_autograd(input, weight, bias, activation, parameters);
}

Outputs linear_act_forward_autograd(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                    std::string_view activation, Numbers parameters) {
  if (needs_native({&input, &weight, pointer(bias)}) || any_requires_grad({&input, &weight, pointer(bias)})) {
    const Tensor z = linear_act(input, weight, bias, Identity::name, {});
    return {activate(check_activation("linear_act", activation, parameters, "activation"), z), z};
  }
  return linear_act_forward_below_autograd(input, weight, bias, activation, parameters);
}

// Second derivatives use the composite of native operations.
LayerGradients linear_act_backward_autograd(const Tensor& grad_output, const std::optional<Tensor>& saved,
                                            const std::optional<Tensor>& input, const std::optional<Tensor>& weight,
                                            std::string_view activation, Numbers parameters,
                                            std::array<bool, 3> output_mask) {
  const auto tensors = {&grad_output, pointer(saved), pointer(input), pointer(weight)};
  if (needs_native(tensors) || any_requires_grad(tensors))
    return linear_act_backward_native(grad_output, saved, input, weight, activation, parameters, output_mask);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return linear_act_backward(grad_output, saved, input, weight, activation, parameters, output_mask);
}

// Like nn.Linear: floating-point tensors except float64 are cast to the autocast dtype.
template <c10::DeviceType device>
Tensor linear_act_autocast(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                           std::string_view activation, Numbers parameters) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const auto cast = [dtype = at::autocast::get_autocast_dtype(device)](const auto& t) {
    return at::autocast::cached_cast(dtype, t, device);
  };
  return linear_act(cast(input), cast(weight), cast(bias), activation, parameters);
}

// ---- mlp ----

OptionalTensors optionals(const variable_list& tensors, size_t begin, size_t count) {
  OptionalTensors list;
  list.reserve(count);
  for (size_t i = begin; i < begin + count; ++i) list.push_back(optional(tensors[i]));
  return list;
}

// One node for all layers. Hidden outputs, and each z that backward needs, are also outputs of the node: saved as such,
// they carry second derivatives.
struct Mlp {
  // y_l = act_l(y_(l-1) W_l^T + b_l). Saves only what backward reads. Returns the outputs of mlp_forward.
  static variable_list forward(const Tensor& input, at::TensorList weights, const OptionalTensors& biases,
                               const Names& activations, Numbers parameters) {
    const variable_list outputs = [&] {
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      return mlp_forward(input, weights, biases, activations, parameters);
    }();
    const size_t L = weights.size();
    const auto layers = layer_activations(activations, parameters);
    variable_list inputs(1 + 2 * L), saved(1 + L + outputs.size());  // x, each W, each b;  x, each W, the outputs
    inputs[0] = input;
    if (weights[0].requires_grad()) saved[0] = input;
    bool reaches = input.requires_grad();  // whether backward goes down to this layer
    for (size_t l = 0; l < L; ++l) {
      Tensor& bias = inputs[1 + L + l];
      inputs[1 + l] = weights[l];
      if (std::optional<Tensor> b = biases[l]) bias = *std::move(b);
      if (reaches) saved[1 + l] = weights[l];
      reaches = reaches || weights[l].requires_grad() || (bias.defined() && bias.requires_grad());
      const size_t for_dz = layers[l].saved;
      if (reaches && layers[l].needs != Needs::nothing) saved[1 + L + for_dz] = outputs[for_dz];
      const bool for_dw = l + 1 < L && weights[l + 1].requires_grad();
      if (for_dw) saved[1 + L + l] = outputs[l];
    }
    record(kDerivative, {activations, parameters.vec()}, inputs, outputs, saved);
    return outputs;
  }

  // Starts from the topmost layer that has a gradient: the last one, except in second derivatives.
  static variable_list backward(const variable_list& grads, const variable_list& saved, const Settings& settings,
                                const std::vector<bool>& needed) {
    Names activations = settings.activations.to<Names>();
    const auto layers = layer_activations(activations, settings.parameters);
    const size_t L = layers.size();
    size_t top = L;
    while (top > 0 && !grads[top - 1].defined() && !grads[layers[top - 1].saved].defined()) --top;

    variable_list result(needed.size());
    std::vector<double> parameters = settings.parameters;
    if (top < L) {
      activations = activations.copy();
      activations.resize(top);
      size_t count = 0;
      for (size_t l = 0; l < top; ++l) count += layers[l].parameters.size();
      parameters.resize(count);
    }
    OptionalTensors grad_outputs, outputs;
    const auto add_output = [&](size_t i) {
      grad_outputs.push_back(optional(grads[i]));
      outputs.push_back(optional(saved[1 + L + i]));
    };
    for (size_t l = 0; l < top; ++l) add_output(l);
    for (size_t l = 0; l < top; ++l)
      if (layers[l].needs == Needs::preactivation) add_output(layers[l].saved);

    c10::List<bool> mask;
    std::vector<size_t> indices;  // into result
    mask.reserve(1 + 2 * top);
    const auto add = [&](size_t begin, size_t count) {
      for (size_t i = begin; i < begin + count; ++i) {
        mask.push_back(needed[i]);
        if (needed[i]) indices.push_back(i);
      }
    };
    add(0, 1 + top);
    add(1 + L, top);

    if (top == 0 || indices.empty()) return result;
    auto gradients = mlp_backward(grad_outputs, optional(saved[0]), optionals(saved, 1, top), outputs, activations,
                                  parameters, mask);
    for (size_t i = 0; i < indices.size(); ++i) result[indices[i]] = std::move(gradients[i]);
    return result;
  }

  static constexpr Derivative kDerivative{"MlpBackward", backward};
};

// The operator's tensor arguments.
struct TensorArgs {
  variable_list tensors;
  c10::SmallVector<const Tensor*, 16> pointers;

  void add(const Tensor& t) { tensors.push_back(t); }
  void add(const std::optional<Tensor>& t) {
    if (t) tensors.push_back(*t);
  }
  void add(at::TensorList list) { tensors.insert(tensors.end(), list.begin(), list.end()); }
  void add(const OptionalTensors& list) {
    for (size_t i = 0; i < list.size(); ++i) add(std::optional<Tensor>(list[i]));
  }
  template <class... Arguments>
  explicit TensorArgs(const Arguments&... arguments) {
    (add(arguments), ...);
    for (const Tensor& t : tensors) pointers.push_back(&t);
  }
};

variable_list mlp_forward_autograd(const Tensor& input, at::TensorList weights, const OptionalTensors& biases,
                                   const Names& activations, Numbers parameters) {
  const TensorArgs given(input, weights, biases);
  if (needs_native(given.pointers)) return mlp_forward_loop(input, weights, biases, activations, parameters);
  if (any_requires_grad(given.pointers)) return Mlp::forward(input, weights, biases, activations, parameters);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return mlp_forward(input, weights, biases, activations, parameters);
}

Tensor mlp_autograd(const Tensor& input, at::TensorList weights, const OptionalTensors& biases,
                    const Names& activations, Numbers parameters) {
  const TensorArgs given(input, weights, biases);
  if (needs_native(given.pointers)) return mlp_loop(input, weights, biases, activations, parameters);
  if (any_requires_grad(given.pointers))
    return Mlp::forward(input, weights, biases, activations, parameters)[weights.size() - 1];
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return mlp(input, weights, biases, activations, parameters);
}

// Second derivatives go layer by layer.
variable_list mlp_backward_autograd(const OptionalTensors& grad_outputs, const std::optional<Tensor>& input,
                                    const OptionalTensors& weights, const OptionalTensors& outputs,
                                    const Names& activations, Numbers parameters, const c10::List<bool>& output_mask) {
  const TensorArgs given(grad_outputs, input, weights, outputs);
  if (needs_native(given.pointers) || any_requires_grad(given.pointers))
    return mlp_backward_loop(grad_outputs, input, weights, outputs, activations, parameters, output_mask);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return mlp_backward(grad_outputs, input, weights, outputs, activations, parameters, output_mask);
}

template <c10::DeviceType device>
Tensor mlp_autocast(const Tensor& input, at::TensorList weights, const OptionalTensors& biases,
                    const Names& activations, Numbers parameters) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const auto cast = [dtype = at::autocast::get_autocast_dtype(device)](const auto& t) {
    return at::autocast::cached_cast(dtype, t, device);
  };
  OptionalTensors cast_biases;
  cast_biases.reserve(biases.size());
  for (size_t l = 0; l < biases.size(); ++l) cast_biases.push_back(cast(std::optional<Tensor>(biases[l])));
  return mlp(cast(input), cast(weights), cast_biases, activations, parameters);
}

}  // namespace

TORCH_LIBRARY_IMPL(mlp_ext, Autograd, m) {
  m.impl("linear_act", with_optional_parameters<linear_act_autograd>);
  m.impl("_linear_act_forward", linear_act_forward_autograd);
  m.impl("_linear_act_backward", linear_act_backward_autograd);
  m.impl("mlp", mlp_autograd);
  m.impl("_mlp_forward", mlp_forward_autograd);
  m.impl("_mlp_backward", mlp_backward_autograd);
}

// autograd.grad(is_grads_batched=True): torch generates no batching rule for operators that take lists.
TORCH_LIBRARY_IMPL(mlp_ext, Batched, m) { m.impl("_mlp_backward", mlp_backward_loop); }

TORCH_LIBRARY_IMPL(mlp_ext, AutocastCPU, m) {
  m.impl("linear_act", with_optional_parameters<linear_act_autocast<c10::kCPU>>);
  m.impl("mlp", mlp_autocast<c10::kCPU>);
}
TORCH_LIBRARY_IMPL(mlp_ext, AutocastCUDA, m) {
  m.impl("linear_act", with_optional_parameters<linear_act_autocast<c10::kCUDA>>);
  m.impl("mlp", mlp_autocast<c10::kCUDA>);
}

}  // namespace mlp_ext
