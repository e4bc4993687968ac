// Autograd and autocast of the operators: forward directly above backward.
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "activations.h"
#include "linear_act.h"
#include "mlp.h"

namespace mlp_ext {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

std::optional<Tensor> optional(const Tensor& t) { return t.defined() ? std::optional<Tensor>(t) : std::nullopt; }

struct LinearAct : torch::autograd::Function<LinearAct> {
  static constexpr bool is_traceable = true;

  // y = act(x W^T + b). Saves what backward reads, and no more: x for dW, W for dx, y for dz.
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                        const std::optional<Tensor>& bias, std::string_view activation) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    const Tensor output = linear_act(input, weight, bias, activation);
    ctx->save_for_backward({saves_output(activation) ? output : Tensor(), weight.requires_grad() ? input : Tensor(),
                            input.requires_grad() ? weight : Tensor()});
    ctx->saved_data["activation"] = std::string(activation);
    ctx->saved_data["has_bias"] = bias.has_value();
    return output;
  }

  // dz = act'(dy, y);  dx = dz W;  dW = dz^T x;  db = sum over rows of dz
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const bool needs_db = ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(2);
    const auto [dx, dw, db] = linear_act_backward(grads[0], optional(saved[0]), optional(saved[1]), optional(saved[2]),
                                                  ctx->saved_data["activation"].toStringView(),
                                                  {ctx->needs_input_grad(0), ctx->needs_input_grad(1), needs_db});
    return {dx, dw, db, Tensor()};
  }
};

// Function supports neither functorch transforms nor forward-mode derivatives; native operations do.
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

// ---- the stack ----

OptionalTensors optionals(const variable_list& tensors, size_t begin, size_t count) {
  OptionalTensors list;
  list.reserve(count);
  for (size_t i = begin; i < begin + count; ++i) list.push_back(optional(tensors[i]));
  return list;
}

struct Stack {
  const Tensor& input;
  at::TensorList weights;
  const OptionalTensors& biases;
  const Names& activations;
};

// One node for all layers. The hidden outputs are outputs of the node as well, though nobody sees them: saved as such,
// they lead second derivatives back through it.
struct Mlp : torch::autograd::Function<Mlp> {
  static constexpr bool is_traceable = true;

  // y_l = act_l(y_(l-1) W_l^T + b_l). Saves what backward reads, and no more.
  // variables: x, each W, then the b that there are.
  static variable_list forward(AutogradContext* ctx, at::TensorList variables, const Stack& stack) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto& [input, weights, biases, activations] = stack;
    const size_t layers = weights.size();
    variable_list outputs = mlp_forward(input, weights, biases, activations);

    variable_list saved(1 + 2 * layers);  // x, each W, each y
    c10::List<bool> has_bias;
    has_bias.reserve(layers);
    bool reaches = input.requires_grad();  // whether a gradient goes down to this layer
    if (weights[0].requires_grad()) saved[0] = input;
    for (size_t l = 0; l < layers; ++l) {
      const std::optional<Tensor> bias = biases[l];
      has_bias.push_back(bias.has_value());
      if (reaches) saved[1 + l] = weights[l];
      reaches = reaches || weights[l].requires_grad() || (bias && bias->requires_grad());
      const bool for_dz = reaches && saves_output(name_at(activations, l));
      const bool for_dw = l + 1 < layers && weights[l + 1].requires_grad();
      if (for_dz || for_dw) saved[1 + layers + l] = outputs[l];
    }
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["activations"] = activations;
    ctx->saved_data["has_bias"] = std::move(has_bias);
    ctx->set_materialize_grads(false);
    return outputs;
  }

  // From the topmost layer that is handed a gradient: the last one, and another only in second derivatives.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    Names activations = ctx->saved_data["activations"].to<Names>();
    const c10::List<bool> has_bias = ctx->saved_data["has_bias"].toBoolList();
    const size_t layers = grads.size();
    size_t top = layers;
    while (top > 0 && !grads[top - 1].defined()) --top;
    if (top < layers) {
      activations = activations.copy();
      activations.resize(top);
    }

    c10::List<bool> mask;
    std::vector<size_t> wanted;  // places in the result
    mask.reserve(1 + 2 * top);
    const auto want = [&](bool has, size_t place) {
      mask.push_back(has && ctx->needs_input_grad(place));
      if (mask.get(mask.size() - 1)) wanted.push_back(place);
    };
    want(true, 0);
    for (size_t l = 0; l < top; ++l) want(true, 1 + l);
    for (size_t l = 0, place = 1 + layers; l < top; place += has_bias[l++]) want(has_bias[l], place);

    variable_list result(1 + layers + std::count(has_bias.begin(), has_bias.end(), true) + 1);  // + the Stack
    if (top == 0 || wanted.empty()) return result;
    auto gradients = mlp_backward(optionals(grads, 0, top), optional(saved[0]), optionals(saved, 1, top),
                                  optionals(saved, 1 + layers, top), activations, mask);
    for (size_t i = 0; i < wanted.size(); ++i) result[wanted[i]] = std::move(gradients[i]);
    return result;
  }
};

// The tensors that the operator is given, in the order of Mlp's variables.
struct Given {
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
  explicit Given(const Arguments&... arguments) {
    (add(arguments), ...);
    for (const Tensor& t : tensors) pointers.push_back(&t);
  }
};

variable_list mlp_forward_autograd(const Tensor& input, at::TensorList weights, const OptionalTensors& biases,
                                   const Names& activations) {
  const Given given(input, weights, biases);
  if (needs_native(given.pointers)) return mlp_forward_loop(input, weights, biases, activations);
  if (any_requires_grad(given.pointers))
    return Mlp::apply(at::TensorList(given.tensors), Stack{input, weights, biases, activations});
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return mlp_forward(input, weights, biases, activations);
}

Tensor mlp_autograd(const Tensor& input, at::TensorList weights, const OptionalTensors& biases,
                    const Names& activations) {
  const Given given(input, weights, biases);
  if (needs_native(given.pointers)) return mlp_loop(input, weights, biases, activations);
  if (any_requires_grad(given.pointers))
    return Mlp::apply(at::TensorList(given.tensors), Stack{input, weights, biases, activations}).back();
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return mlp(input, weights, biases, activations);
}

// Second derivatives are those of each layer's backward.
variable_list mlp_backward_autograd(const OptionalTensors& grad_outputs, const std::optional<Tensor>& input,
                                    const OptionalTensors& weights, const OptionalTensors& outputs,
                                    const Names& activations, const c10::List<bool>& output_mask) {
  const Given given(grad_outputs, input, weights, outputs);
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

TORCH_LIBRARY_IMPL(mlp_ext, AutocastCPU, m) {
  m.impl("linear_act", linear_act_autocast<c10::kCPU>);
  m.impl("mlp", mlp_autocast<c10::kCPU>);
}
TORCH_LIBRARY_IMPL(mlp_ext, AutocastCUDA, m) {
  m.impl("linear_act", linear_act_autocast<c10::kCUDA>);
  m.impl("mlp", mlp_autocast<c10::kCUDA>);
}

}  // namespace mlp_ext
