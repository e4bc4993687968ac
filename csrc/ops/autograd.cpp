// Autograd and autocast of the operators: forward directly above backward.
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "math/activations.h"
#include "ops/linear_act.h"
#include "ops/mlp.h"
#include "ops/node.h"

namespace mlp_ext {
namespace {

using at::Tensor;
using torch::autograd::variable_list;

Tensor linear_act_below_autograd(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                 std::string_view activation) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return linear_act(input, weight, bias, activation);
}

std::optional<Tensor> optional(const Tensor& t) { return t.defined() ? std::optional<Tensor>(t) : std::nullopt; }

struct LinearAct {
  // y = act(x W^T + b). Saves what backward reads, and no more: x for dW, W for dx, y for dz.
  static Tensor forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                        std::string_view activation) {
    const Tensor output = linear_act_below_autograd(input, weight, bias, activation);
    record(kDerivative, std::string(activation), {input, weight, bias.value_or(Tensor())}, {output},
           {saves_output(activation) ? output : Tensor(), weight.requires_grad() ? input : Tensor(),
            input.requires_grad() ? weight : Tensor()});
    return output;
  }

  // dz = act'(dy, y);  dx = dz W;  dW = dz^T x;  db = sum over rows of dz
  static variable_list backward(const variable_list& grads, const variable_list& saved, const c10::IValue& activation,
                                const std::vector<bool>& wanted) {
    if (!grads[0].defined()) return variable_list(wanted.size());
    const auto [dx, dw, db] = linear_act_backward(grads[0], optional(saved[0]), optional(saved[1]), optional(saved[2]),
                                                  activation.toStringView(), {wanted[0], wanted[1], wanted[2]});
    return {dx, dw, db};
  }

  static constexpr Derivative kDerivative{"LinearActBackward", backward};
};

// Our node knows neither functorch transforms nor forward-mode derivatives; native operations do.
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
                           std::string_view activation) {
  if (needs_native({&input, &weight, pointer(bias)})) return linear_act_native(input, weight, bias, activation);
  if (any_requires_grad({&input, &weight, pointer(bias)})) return LinearAct::forward(input, weight, bias, activation);
  return linear_act_below_autograd(input, weight, bias, activation);
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

// ---- the stack ----

OptionalTensors optionals(const variable_list& tensors, size_t begin, size_t count) {
  OptionalTensors list;
  list.reserve(count);
  for (size_t i = begin; i < begin + count; ++i) list.push_back(optional(tensors[i]));
  return list;
}

// One node for all layers. The hidden outputs are outputs of the node as well, though nobody sees them: saved as such,
// they lead second derivatives back through it.
struct Mlp {
  // y_l = act_l(y_(l-1) W_l^T + b_l). Saves what backward reads, and no more.
  static variable_list forward(const Tensor& input, at::TensorList weights, const OptionalTensors& biases,
                               const Names& activations) {
    const variable_list outputs = [&] {
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      return mlp_forward(input, weights, biases, activations);
    }();
    const size_t layers = weights.size();
    variable_list inputs(1 + 2 * layers), saved(1 + 2 * layers);  // x, each W, each b;  x, each W, each y
    inputs[0] = input;
    if (weights[0].requires_grad()) saved[0] = input;
    bool reaches = input.requires_grad();  // whether a gradient goes down to this layer
    for (size_t l = 0; l < layers; ++l) {
      Tensor& bias = inputs[1 + layers + l];
      inputs[1 + l] = weights[l];
      if (std::optional<Tensor> b = biases[l]) bias = *std::move(b);
      if (reaches) saved[1 + l] = weights[l];
      reaches = reaches || weights[l].requires_grad() || (bias.defined() && bias.requires_grad());
      const bool for_dz = reaches && saves_output(name_at(activations, l));
      const bool for_dw = l + 1 < layers && weights[l + 1].requires_grad();
      if (for_dz || for_dw) saved[1 + layers + l] = outputs[l];
    }
    record(kDerivative, activations, inputs, outputs, saved);
    return outputs;
  }

  // From the topmost layer that is handed a gradient: the last one, and another only in second derivatives.
  static variable_list backward(const variable_list& grads, const variable_list& saved, const c10::IValue& names,
                                const std::vector<bool>& wanted) {
    const size_t layers = grads.size();
    size_t top = layers;
    while (top > 0 && !grads[top - 1].defined()) --top;
    Names activations = names.to<Names>();
    if (top < layers) {
      activations = activations.copy();
      activations.resize(top);
    }

    c10::List<bool> mask;
    std::vector<size_t> places;  // in the result
    mask.reserve(1 + 2 * top);
    const auto add = [&](size_t begin, size_t count) {
      for (size_t place = begin; place < begin + count; ++place) {
        mask.push_back(wanted[place]);
        if (wanted[place]) places.push_back(place);
      }
    };
    add(0, 1 + top);
    add(1 + layers, top);

    variable_list result(wanted.size());
    if (top == 0 || places.empty()) return result;
    auto gradients = mlp_backward(optionals(grads, 0, top), optional(saved[0]), optionals(saved, 1, top),
                                  optionals(saved, 1 + layers, top), activations, mask);
    for (size_t i = 0; i < places.size(); ++i) result[places[i]] = std::move(gradients[i]);
    return result;
  }

  static constexpr Derivative kDerivative{"MlpBackward", backward};
};

// The tensors that the operator is given.
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
                                   const Names& activations) {
  const TensorArgs given(input, weights, biases);
  if (needs_native(given.pointers)) return mlp_forward_loop(input, weights, biases, activations);
  if (any_requires_grad(given.pointers)) return Mlp::forward(input, weights, biases, activations);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return mlp_forward(input, weights, biases, activations);
}

Tensor mlp_autograd(const Tensor& input, at::TensorList weights, const OptionalTensors& biases,
                    const Names& activations) {
  const TensorArgs given(input, weights, biases);
  if (needs_native(given.pointers)) return mlp_loop(input, weights, biases, activations);
  if (any_requires_grad(given.pointers)) return Mlp::forward(input, weights, biases, activations).back();
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return mlp(input, weights, biases, activations);
}

// Second derivatives are those of each layer's backward.
variable_list mlp_backward_autograd(const OptionalTensors& grad_outputs, const std::optional<Tensor>& input,
                                    const OptionalTensors& weights, const OptionalTensors& outputs,
                                    const Names& activations, const c10::List<bool>& output_mask) {
  const TensorArgs given(grad_outputs, input, weights, outputs);
  if (needs_native(given.pointers) || any_requires_grad(given.pointers))
    return mlp_backward_loop(grad_outputs, input, weights, outputs, activations, output_mask);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return mlp_backward(grad_outputs, input, weights, outputs, activations, output_mask);
}

template <c10::DeviceType device>
Tensor mlp_autocast(const Tensor& input, at::TensorList weights, const OptionalTensors& biases,
                    const Names& activations) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const auto cast = [dtype = at::autocast::get_autocast_dtype(device)](const auto& t) {
    return at::autocast::cached_cast(dtype, t, device);
  };
  OptionalTensors cast_biases;
  cast_biases.reserve(biases.size());
  for (size_t l = 0; l < biases.size(); ++l) cast_biases.push_back(cast(std::optional<Tensor>(biases[l])));
  return mlp(cast(input), cast(weights), cast_biases, activations);
}

}  // namespace

TORCH_LIBRARY_IMPL(mlp_ext, Autograd, m) {
  m.impl("linear_act", linear_act_autograd);
  m.impl("_linear_act_backward", linear_act_backward_autograd);
  m.impl("mlp", mlp_autograd);
  m.impl("_mlp_forward", mlp_forward_autograd);
  m.impl("_mlp_backward", mlp_backward_autograd);
}

// A batch of gradients, as autograd.grad(is_grads_batched=True) hands in: torch makes no rule for an operator of lists.
TORCH_LIBRARY_IMPL(mlp_ext, Batched, m) { m.impl("_mlp_backward", mlp_backward_loop); }

TORCH_LIBRARY_IMPL(mlp_ext, AutocastCPU, m) {
  m.impl("linear_act", linear_act_autocast<c10::kCPU>);
  m.impl("mlp", mlp_autocast<c10::kCPU>);
}
TORCH_LIBRARY_IMPL(mlp_ext, AutocastCUDA, m) {
  m.impl("linear_act", linear_act_autocast<c10::kCUDA>);
  m.impl("mlp", mlp_autocast<c10::kCUDA>);
}

}  // namespace mlp_ext
