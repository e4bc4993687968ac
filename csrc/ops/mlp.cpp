// The operator mlp, a stack of linear_act: schema, argument checks, calls through the dispatcher, and the loop over the
// layers that serves every device.
#include "ops/mlp.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "math/activations.h"
#include "ops/checks.h"
#include "ops/linear_act.h"

namespace mlp_ext {

namespace {

constexpr const char* kOp = "mlp";

// All that linear_act would complain about, before any layer is computed.
void check_mlp(const at::Tensor& input, at::TensorList weights, const OptionalTensors& biases,
               const Names& activations) {
  TORCH_CHECK(!weights.empty(), "mlp: weights must have one for each layer, at least one, got none");
  TORCH_CHECK(biases.size() == weights.size(), "mlp: biases must have one, or None, for each of the ", weights.size(),
              " weights, got ", biases.size());
  TORCH_CHECK(activations.size() == weights.size(), "mlp: activations must have one for each of the ", weights.size(),
              " weights, got ", activations.size());
  check_dtype(kOp, input, "input");
  TORCH_CHECK(input.dim() >= 1, "mlp: input must be [*, K], got a 0-dimensional tensor");
  for (size_t l = 0; l < weights.size(); ++l) {
    const at::Tensor& weight = weights[l];
    const Element name{"weights", l};
    check_activation(kOp, name_at(activations, l), Element{"activations", l});
    check_like(kOp, weight, name, input, "input");
    check_weight(kOp, weight, name);
    if (l == 0) {
      TORCH_SYM_CHECK(weight.sym_size(1).sym_eq(input.sym_size(-1)), "mlp: ", name,
                      " must be [N, K=", input.sym_size(-1), "] to match input ", input.sym_sizes(), ", got ",
                      weight.sym_sizes());
    } else {
      const c10::SymInt width = weights[l - 1].sym_size(0);
      TORCH_SYM_CHECK(weight.sym_size(1).sym_eq(width), "mlp: ", name, " must be [N, K=", width, "] to match the ",
                      width, " outputs of layer ", l - 1, ", got ", weight.sym_sizes());
    }
    if (const std::optional<at::Tensor> bias = biases[l]) {
      check_like(kOp, *bias, Element{"biases", l}, input, "input");
      TORCH_CHECK(bias->dim() == 1, "mlp: ", Element{"biases", l}, " must be [N=", weight.sym_size(0), "], got ",
                  bias->sym_sizes());
      TORCH_SYM_CHECK(bias->sym_size(0).sym_eq(weight.sym_size(0)), "mlp: ", Element{"biases", l},
                      " must be [N=", weight.sym_size(0), "] to match ", name, " ", weight.sym_sizes(), ", got ",
                      bias->sym_sizes());
    }
  }
}

// What the layers themselves cannot see; their own backward checks the rest.
void check_mlp_backward(const OptionalTensors& grad_outputs, const OptionalTensors& weights,
                        const OptionalTensors& outputs, const Names& activations, const c10::List<bool>& output_mask) {
  const size_t layers = activations.size();
  TORCH_CHECK(layers > 0, "_mlp_backward: activations must have one for each layer, at least one, got none");
  const auto check_length = [&](size_t found, const char* name, size_t expected) {
    TORCH_CHECK(found == expected, "_mlp_backward: ", name, " must have ", expected, " elements for ", layers,
                " layers, got ", found);
  };
  check_length(grad_outputs.size(), "grad_outputs", layers);
  check_length(weights.size(), "weights", layers);
  check_length(outputs.size(), "outputs", layers);
  check_length(output_mask.size(), "output_mask", 1 + 2 * layers);
  TORCH_CHECK(grad_outputs.get(layers - 1), "_mlp_backward: ", Element{"grad_outputs", layers - 1},
              ", that of the last layer, must be given, got None");
}

}  // namespace

at::Tensor mlp(const at::Tensor& input, at::TensorList weights, const OptionalTensors& biases,
               const Names& activations) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("mlp_ext::mlp", "").typed<decltype(mlp)>();
  return op.call(input, weights, biases, activations);
}

std::vector<at::Tensor> mlp_forward(const at::Tensor& input, at::TensorList weights, const OptionalTensors& biases,
                                    const Names& activations) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mlp_ext::_mlp_forward", "").typed<decltype(mlp_forward)>();
  return op.call(input, weights, biases, activations);
}

std::vector<at::Tensor> mlp_backward(const OptionalTensors& grad_outputs, const std::optional<at::Tensor>& input,
                                     const OptionalTensors& weights, const OptionalTensors& outputs,
                                     const Names& activations, const c10::List<bool>& output_mask) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mlp_ext::_mlp_backward", "").typed<decltype(mlp_backward)>();
  return op.call(grad_outputs, input, weights, outputs, activations, output_mask);
}

// y_l = act_l(y_(l-1) W_l^T + b_l)
at::Tensor mlp_loop(const at::Tensor& input, at::TensorList weights, const OptionalTensors& biases,
                    const Names& activations) {
  check_mlp(input, weights, biases, activations);
  at::Tensor y = input;
  for (size_t l = 0; l < weights.size(); ++l) y = linear_act(y, weights[l], biases[l], name_at(activations, l));
  return y;
}

std::vector<at::Tensor> mlp_forward_loop(const at::Tensor& input, at::TensorList weights, const OptionalTensors& biases,
                                         const Names& activations) {
  check_mlp(input, weights, biases, activations);
  std::vector<at::Tensor> outputs;
  outputs.reserve(weights.size());
  for (size_t l = 0; l < weights.size(); ++l)
    outputs.push_back(linear_act(l ? outputs[l - 1] : input, weights[l], biases[l], name_at(activations, l)));
  return outputs;
}

// dz_l = act'(dy_l, y_l);  dW_l = dz_l^T y_(l-1);  db_l = sum over rows of dz_l;  dy_(l-1) = dz_l W_l + what the hidden
// output's other readers hand in.  Down to the lowest layer below which nothing is wanted.
std::vector<at::Tensor> mlp_backward_loop(const OptionalTensors& grad_outputs, const std::optional<at::Tensor>& input,
                                          const OptionalTensors& weights, const OptionalTensors& outputs,
                                          const Names& activations, const c10::List<bool>& output_mask) {
  check_mlp_backward(grad_outputs, weights, outputs, activations, output_mask);
  const size_t layers = activations.size();
  const bool wants_dx = output_mask[0];
  const auto wants_dw = [&](size_t l) -> bool { return output_mask[1 + l]; };
  const auto wants_db = [&](size_t l) -> bool { return output_mask[1 + layers + l]; };
  size_t lowest = 0;
  while (!wants_dx && lowest < layers && !wants_dw(lowest) && !wants_db(lowest)) ++lowest;

  std::vector<at::Tensor> gradients(output_mask.size());  // in the order of output_mask
  at::Tensor dy = *grad_outputs.get(layers - 1);
  for (size_t l = layers; l-- > lowest;) {
    const bool goes_down = l > lowest || wants_dx;
    const std::optional<at::Tensor> x = l ? outputs.get(l - 1) : input;
    auto [dx, dw, db] = linear_act_backward(dy, outputs[l], x, weights[l], name_at(activations, l),
                                            {goes_down, wants_dw(l), wants_db(l)});
    gradients[1 + l] = std::move(dw);
    gradients[1 + layers + l] = std::move(db);
    dy = std::move(dx);
    if (l == 0 || !goes_down) continue;
    if (const std::optional<at::Tensor> grad = grad_outputs[l - 1]) {
      TORCH_CHECK(grad->sym_sizes() == dy.sym_sizes(), "_mlp_backward: ", Element{"grad_outputs", l - 1}, " must be ",
                  dy.sym_sizes(), ", got ", grad->sym_sizes());
      dy = dy + *grad;
    }
  }
  if (wants_dx) gradients[0] = std::move(dy);
  std::erase_if(gradients, [](const at::Tensor& t) { return !t.defined(); });
  return gradients;
}

TORCH_LIBRARY_FRAGMENT(mlp_ext, m) {
  m.def("mlp(Tensor input, Tensor[] weights, Tensor?[] biases, str[] activations) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def("_mlp_forward(Tensor input, Tensor[] weights, Tensor?[] biases, str[] activations) -> Tensor[]",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "_mlp_backward(Tensor?[] grad_outputs, Tensor? input, Tensor?[] weights, Tensor?[] outputs, str[] activations, "
      "bool[] output_mask) -> Tensor[]",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(mlp_ext, CompositeExplicitAutograd, m) {
  m.impl("mlp", mlp_loop);
  m.impl("_mlp_forward", mlp_forward_loop);
  m.impl("_mlp_backward", mlp_backward_loop);
}

// torch.jit.trace has no words for Tensor?[]: it records the layers.
TORCH_LIBRARY_IMPL(mlp_ext, Tracer, m) {
  m.impl("mlp", mlp_loop);
  m.impl("_mlp_forward", mlp_forward_loop);
}

// vmap's rules are those of one layer.
TORCH_LIBRARY_IMPL(mlp_ext, FuncTorchBatched, m) {
  m.impl("mlp", mlp_loop);
  m.impl("_mlp_forward", mlp_forward_loop);
  m.impl("_mlp_backward", mlp_backward_loop);
}

}  // namespace mlp_ext
