// The operator mlp, a stack of linear_act layers: schema, argument checks, dispatcher calls, and the loop over layers
// that serves every device.
#include "ops/mlp.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "ops/checks.h"
#include "ops/linear_act.h"

namespace mlp_ext {

namespace {

constexpr const char *kMlp = "mlp", *kMlpBackward = "_mlp_backward";

// All checks of linear_act, before any layer is computed.
c10::SmallVector<LayerActivation, 8> check_mlp(const at::Tensor& input, at::TensorList weights,
                                               const OptionalTensors& biases, const Names& activations,
                                               Numbers parameters) {
  TORCH_CHECK(!weights.empty(), "mlp: weights must have one for each layer, at least one, got none");
  TORCH_CHECK(biases.size() == weights.size(), "mlp: biases must have one, or None, for each of the ", weights.size(),
              " weights, got ", biases.size());
  TORCH_CHECK(activations.size() == weights.size(), "mlp: activations must have one for each of the ", weights.size(),
              " weights, got ", activations.size());
  check_dtype(kMlp, input, "input");
  TORCH_CHECK(input.dim() >= 1, "mlp: input must be [*, K], got a 0-dimensional tensor");
  const auto layers = layer_activations(activations, parameters);
  for (size_t l = 0; l < weights.size(); ++l) {
    const Element weight{"weights", l}, bias{"biases", l};
    if (l == 0) {
      check_layer(kMlp, weights[l], weight, biases[l], bias, input, input.sym_size(-1), "input ", input.sym_sizes());
    } else {
      const c10::SymInt K = weights[l - 1].sym_size(0);
      check_layer(kMlp, weights[l], weight, biases[l], bias, input, K, "the ", K, " outputs of layer ", l - 1);
    }
  }
  return layers;
}

// Checks lengths of lists; each layer's backward checks the rest.
void check_mlp_backward(const OptionalTensors& grad_outputs, const OptionalTensors& weights,
                        const OptionalTensors& outputs, c10::ArrayRef<LayerActivation> layers,
                        const c10::List<bool>& output_mask) {
  const size_t L = layers.size();
  TORCH_CHECK(L > 0, kMlpBackward, ": activations must have one for each layer, at least one, got none");
  size_t saved = L;
  for (const LayerActivation& layer : layers) saved += layer.needs == Needs::preactivation;
  const auto check_length = [&](size_t found, const char* name, size_t expected) {
    TORCH_CHECK(found == expected, kMlpBackward, ": ", name, " must have ", expected, " elements for ", L,
                " layers, got ", found);
  };
  check_length(grad_outputs.size(), "grad_outputs", saved);
  check_length(weights.size(), "weights", L);
  check_length(outputs.size(), "outputs", saved);
  check_length(output_mask.size(), "output_mask", 1 + 2 * L);
  TORCH_CHECK(grad_outputs.get(L - 1) || grad_outputs.get(layers.back().saved), kMlpBackward, ": ",
              Element{"grad_outputs", L - 1}, ", that of the last layer, must be given, got None");
}

}  // namespace

at::Tensor mlp(const at::Tensor& input, at::TensorList weights, const OptionalTensors& biases, const Names& activations,
               Numbers parameters) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("mlp_ext::mlp", "").typed<decltype(mlp)>();
  return op.call(input, weights, biases, activations, parameters);
}

std::vector<at::Tensor> mlp_forward(const at::Tensor& input, at::TensorList weights, const OptionalTensors& biases,
                                    const Names& activations, Numbers parameters) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mlp_ext::_mlp_forward", "").typed<decltype(mlp_forward)>();
  return op.call(input, weights, biases, activations, parameters);
}

std::vector<at::Tensor> mlp_backward(const OptionalTensors& grad_outputs, const std::optional<at::Tensor>& input,
                                     const OptionalTensors& weights, const OptionalTensors& outputs,
                                     const Names& activations, Numbers parameters, const c10::List<bool>& output_mask) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mlp_ext::_mlp_backward", "").typed<decltype(mlp_backward)>();
  return op.call(grad_outputs, input, weights, outputs, activations, parameters, output_mask);
}

c10::SmallVector<LayerActivation, 8> layer_activations(const Names& activations, Numbers parameters) {
  c10::SmallVector<LayerActivation, 8> layers;
  LayerParameters layer_parameters(kMlp, parameters);
  size_t next_z = activations.size();
  for (size_t l = 0; l < activations.size(); ++l) {
    const std::string_view name = name_at(activations, l);
    const Numbers own = layer_parameters.next(name);
    const Needs needs = needs_of(check_activation(kMlp, name, own, Element{"activations", l}));
    layers.push_back({name, own, needs, needs == Needs::preactivation ? next_z++ : l});
  }
  layer_parameters.check_all_taken();
  return layers;
}

// y_l = act_l(y_(l-1) W_l^T + b_l)
at::Tensor mlp_loop(const at::Tensor& input, at::TensorList weights, const OptionalTensors& biases,
                    const Names& activations, Numbers parameters) {
  at::Tensor y = input;
  size_t l = 0;
  for (const auto& [name, own, needs, saved] : check_mlp(input, weights, biases, activations, parameters)) {
    y = linear_act(y, weights[l], biases[l], name, own);
    ++l;
  }
  return y;
}

std::vector<at::Tensor> mlp_forward_loop(const at::Tensor& input, at::TensorList weights, const OptionalTensors& biases,
                                         const Names& activations, Numbers parameters) {
  std::vector<at::Tensor> ys, zs;
  at::Tensor x = input;
  for (const auto& [name, own, needs, saved] : check_mlp(input, weights, biases, activations, parameters)) {
    const size_t l = ys.size();
    if (needs == Needs::preactivation) {
      auto [y, z] = linear_act_forward(x, weights[l], biases[l], name, own);
      x = std::move(y);
      zs.push_back(std::move(z));
    } else {
      x = linear_act(x, weights[l], biases[l], name, own);
    }
    ys.push_back(x);
  }
  ys.insert(ys.end(), zs.begin(), zs.end());
  return ys;
}

// dz_l = act'(dy_l, saved_l);  dW_l = dz_l^T y_(l-1);  db_l = sum over rows of dz_l;  dy_(l-1) = dz_l W_l.  Stops at
// the lowest layer that needs a gradient.  In second derivatives hidden outputs and z have gradients too, which are
// added to dy_l and dz_l.
std::vector<at::Tensor> mlp_backward_loop(const OptionalTensors& grad_outputs, const std::optional<at::Tensor>& input,
                                          const OptionalTensors& weights, const OptionalTensors& outputs,
                                          const Names& activations, Numbers parameters,
                                          const c10::List<bool>& output_mask) {
  const auto layers = layer_activations(activations, parameters);
  check_mlp_backward(grad_outputs, weights, outputs, layers, output_mask);
  const size_t L = layers.size();
  const bool needs_dx = output_mask[0];
  const auto needs_dw = [&](size_t l) -> bool { return output_mask[1 + l]; };
  const auto needs_db = [&](size_t l) -> bool { return output_mask[1 + L + l]; };
  size_t lowest = 0;
  while (!needs_dx && lowest < L && !needs_dw(lowest) && !needs_db(lowest)) ++lowest;

  std::vector<at::Tensor> gradients(output_mask.size());  // in the order of output_mask
  const auto add = [](at::Tensor& sum, const at::Tensor& t) {
    if (t.defined()) sum = sum.defined() ? sum + t : t;
  };
  at::Tensor dy;
  for (size_t l = L; l-- > lowest;) {
    const auto& [name, own, needs, saved] = layers[l];
    const std::array<bool, 3> mask{l > lowest || needs_dx, needs_dw(l), needs_db(l)};
    const std::optional<at::Tensor> x = l ? outputs.get(l - 1) : input;
    at::Tensor below;
    const auto backward = [&](const at::Tensor& grad, std::string_view activation, Numbers numbers) {
      const auto [dx, dw, db] = linear_act_backward(grad, outputs[saved], x, weights[l], activation, numbers, mask);
      add(below, dx);
      add(gradients[1 + l], dw);
      add(gradients[1 + L + l], db);
    };
    if (const std::optional<at::Tensor> grad = grad_outputs[l]) {
      TORCH_CHECK(!dy.defined() || grad->sym_sizes() == dy.sym_sizes(), kMlpBackward, ": ", Element{"grad_outputs", l},
                  " must be ", dy.sym_sizes(), ", got ", grad->sym_sizes());
      add(dy, *grad);
    }
    if (dy.defined()) backward(dy, name, own);
    if (needs == Needs::preactivation)
      if (const std::optional<at::Tensor> grad = grad_outputs[saved]) backward(*grad, Identity::name, {});
    dy = std::move(below);
  }
  if (needs_dx) gradients[0] = std::move(dy);
  std::erase_if(gradients, [](const at::Tensor& t) { return !t.defined(); });
  return gradients;
}

TORCH_LIBRARY_FRAGMENT(mlp_ext, m) {
  m.def(
      "mlp(Tensor input, Tensor[] weights, Tensor?[] biases, str[] activations, float[] parameters=[]) -> "
      "Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_mlp_forward(Tensor input, Tensor[] weights, Tensor?[] biases, str[] activations, float[] parameters=[]) -> "
      "Tensor[]",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_mlp_backward(Tensor?[] grad_outputs, Tensor? input, Tensor?[] weights, Tensor?[] outputs, str[] activations, "
      "float[] parameters, bool[] output_mask) -> Tensor[]",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(mlp_ext, CompositeExplicitAutograd, m) {
  m.impl("mlp", mlp_loop);
  m.impl("_mlp_forward", mlp_forward_loop);
  m.impl("_mlp_backward", mlp_backward_loop);
}

// torch.jit.trace cannot record Tensor?[] arguments, so it records the layers.
TORCH_LIBRARY_IMPL(mlp_ext, Tracer, m) {
  m.impl("mlp", mlp_loop);
  m.impl("_mlp_forward", mlp_forward_loop);
}

// vmap uses the rules of single layers.
TORCH_LIBRARY_IMPL(mlp_ext, FuncTorchBatched, m) {
  m.impl("mlp", mlp_loop);
  m.impl("_mlp_forward", mlp_forward_loop);
  m.impl("_mlp_backward", mlp_backward_loop);
}

}  // namespace mlp_ext
