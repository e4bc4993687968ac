// The operator mlp_sgd_step_: schema, argument checks, calls through the dispatcher, and the composite of native
// operations that serves devices without kernels of ours.
#include "ops/train.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/binary_cross_entropy.h>
#include <ATen/ops/binary_cross_entropy_backward.h>
#include <ATen/ops/binary_cross_entropy_with_logits.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/eq.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/mse_loss.h>
#include <ATen/ops/mse_loss_backward.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/sigmoid.h>
#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include <algorithm>

#include "math/losses.h"
#include "ops/checks.h"
#include "ops/linear_act.h"
#include "ops/mlp.h"

namespace mlp_ext {

namespace {

constexpr const char* kOp = "mlp_sgd_step_";

template <class... Loss>
size_t loss_index(std::string_view name, TypeList<Loss...> losses) {
  const size_t index = activation_index(name, losses);
  TORCH_CHECK_VALUE(index < losses.size, kOp, ": loss must be one of ", activation_names(losses), ", got '", name, "'");
  return index;
}
constexpr size_t kMSE = activation_index(MSE::name, Losses{}), kBCE = activation_index(BCE::name, Losses{});

// The layers of a list of parameters: a weight has two dimensions, and a bias after it one.
c10::SmallVector<StepLayer, 8> layers_of(at::TensorList parameters, const c10::List<std::string>& activations) {
  c10::SmallVector<StepLayer, 8> layers;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const at::Tensor& p = parameters[i];
    const bool is_bias = p.dim() == 1 && !layers.empty() && !layers.back().bias.value;
    TORCH_CHECK(is_bias || p.dim() == 2, kOp,
                ": parameters must be of each layer weight [N, K] and, if it has one, bias [N]; parameters[", i,
                "] is ", p.sym_sizes());
    if (is_bias)
      layers.back().bias.value = &p;
    else
      layers.push_back({{&p}, {}, 0});
  }
  TORCH_CHECK(!layers.empty(), kOp, ": parameters must hold at least one weight [N, K]");
  TORCH_CHECK(layers.size() == activations.size(), kOp, ": activations must be one for each of ", layers.size(),
              " layers, got ", activations.size());
  for (size_t l = 0; l < layers.size(); ++l) {
    const std::string_view name = name_at(activations, l);
    layers[l].activation = activation_index(name);
    TORCH_CHECK_VALUE(layers[l].activation < Activations::size, kOp, ": activations must be among ", activation_names(),
                      ", got '", name, "'");
  }
  return layers;
}

void check_target(const Step& step, const at::Tensor& weight) {
  const at::Tensor &input = step.input, &target = step.target;
  const auto N = weight.sym_size(0);
  if (step.target_is_classes) {
    TORCH_CHECK(target.device() == input.device(), kOp, ": target must be on ", input.device(), " to match input, got ",
                target.device());
    TORCH_CHECK(target.dim() == 1 && target.sym_size(0) == input.sym_size(0), kOp,
                ": target must be [M=", input.sym_size(0), "] of classes to match input ", input.sym_sizes(), ", got ",
                target.sym_sizes());
  } else {
    check_like(kOp, target, "target", input, "input");
    TORCH_CHECK(target.dim() == 2 && target.sym_size(0) == input.sym_size(0) && target.sym_size(1) == N, kOp,
                ": target must be [M=", input.sym_size(0), ", N=", N, "] to match the output, got ",
                target.sym_sizes());
  }
}

// That it can be updated in place, which later would be too late: other parameters have changed by then.
void check_writable(const at::Tensor& t, const char* name) {
  TORCH_CHECK(!t.is_inference() || c10::InferenceMode::is_enabled(), kOp, ": ", name,
              " is an inference tensor, which cannot be updated");
  if (!t.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) at::assert_no_internal_overlap(t);
}

void set_hyperparameters(c10::SmallVector<StepLayer, 8>& layers, at::TensorList momentum_buffers,
                         at::IntArrayRef learning, at::ArrayRef<double> hyperparameters) {
  TORCH_CHECK(hyperparameters.size() == learning.size() * Sgd::size, kOp, ": hyperparameters must be ", Sgd::size,
              " for each of ", learning.size(), " parameters that learn, got ", hyperparameters.size());
  c10::SmallVector<StepParameter*, 16> all;
  for (StepLayer& layer : layers) {
    all.push_back(&layer.weight);
    if (layer.bias.value) all.push_back(&layer.bias);
  }
  size_t buffers = 0;
  int64_t last = -1;
  for (size_t i = 0; i < learning.size(); ++i) {
    const int64_t place = learning[i];
    TORCH_CHECK(place > last && place < static_cast<int64_t>(all.size()), kOp,
                ": learning must be rising places among ", all.size(), " parameters, got ", learning);
    last = place;
    StepParameter& p = *all[place];
    check_writable(*p.value, "a parameter");
    const double* h = &hyperparameters[i * Sgd::size];
    p.sgd = Sgd{h[0], h[1], h[2], h[3], h[4] != 0, h[5] != 0};
    if (p.sgd->momentum == 0) continue;
    TORCH_CHECK(buffers < momentum_buffers.size(), kOp,
                ": momentum_buffers must be one for each parameter that learns with momentum, got ",
                momentum_buffers.size());
    const at::Tensor& buffer = momentum_buffers[buffers++];
    check_like(kOp, buffer, "a momentum buffer", *p.value, "input");
    TORCH_CHECK(buffer.sym_sizes() == p.value->sym_sizes(), kOp, ": a momentum buffer must be ", p.value->sym_sizes(),
                " like its parameter, got ", buffer.sym_sizes());
    check_writable(buffer, "a momentum buffer");
    p.momentum_buffer = &buffer;
  }
  TORCH_CHECK(buffers == momentum_buffers.size(), kOp,
              ": momentum_buffers must be one for each parameter that learns with momentum, ", buffers, ", got ",
              momentum_buffers.size());
}

// The bytes from a tensor's first element to its last.
struct Span {
  const char *begin, *end;
  const char* name;
  bool is_written;
};

// That nothing which the step writes shares memory with anything else that it reads or writes. Views that take turns
// within one block of memory, such as two halves of a matrix's columns, count as sharing it.
void check_memory(const Step& step) {
  if (step.input.is_meta()) return;
  c10::SmallVector<Span, 24> spans;
  const auto add = [&spans](const at::Tensor& t, const char* name, bool is_written) {
    if (!t.has_storage() || t.numel() == 0) return;
    int64_t last = 0;  // element
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
    const char* const begin = static_cast<const char*>(t.const_data_ptr());
    spans.push_back({begin, begin + (last + 1) * static_cast<int64_t>(t.element_size()), name, is_written});
  };
  add(step.input, "input", false);
  add(step.target, "target", false);
  if (step.loss_weight) add(*step.loss_weight, "loss_weight", false);
  for (const StepLayer& layer : step.layers)
    for (const StepParameter* p : {&layer.weight, &layer.bias}) {
      if (p->value) add(*p->value, p->sgd ? "a parameter that learns" : "a parameter", p->sgd.has_value());
      if (p->momentum_buffer) add(*p->momentum_buffer, "a momentum buffer", true);
    }
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  const Span *farthest = nullptr, *farthest_written = nullptr;  // among those that begin before
  for (const Span& span : spans) {
    const Span* const other = span.is_written ? farthest : farthest_written;
    if (other && other->end > span.begin) {
      const auto [first, second] = span.is_written ? std::pair(other, &span) : std::pair(&span, other);
      TORCH_CHECK(false, kOp, ": ", first->name, " must not share memory with ", second->name, "; pass a clone()");
    }
    if (!farthest || span.end > farthest->end) farthest = &span;
    if (span.is_written && (!farthest_written || span.end > farthest_written->end)) farthest_written = &span;
  }
}

}  // namespace

Step check_step(const at::Tensor& input, const at::Tensor& target, at::TensorList parameters,
                at::TensorList momentum_buffers, const c10::List<std::string>& activations, std::string_view loss,
                std::string_view reduction, const std::optional<at::Tensor>& loss_weight, int64_t ignore_index,
                double label_smoothing, at::IntArrayRef learning, at::ArrayRef<double> hyperparameters) {
  Step step{input,
            target,
            loss_weight ? &*loss_weight : nullptr,
            layers_of(parameters, activations),
            loss_index(loss, Losses{}),
            reduction == "mean",
            ignore_index,
            label_smoothing};
  TORCH_CHECK_VALUE(step.mean || reduction == "sum", kOp, ": reduction must be mean or sum, got '", reduction, "'");
  check_dtype(kOp, input, "input");
  TORCH_CHECK(input.dim() == 2, kOp, ": input must be [M, K], got ", input.sym_sizes());
  auto width = input.sym_size(1);
  for (size_t l = 0; l < step.layers.size(); ++l) {
    const at::Tensor &weight = *step.layers[l].weight.value, *const bias = step.layers[l].bias.value;
    check_like(kOp, weight, "a weight", input, "input");
    TORCH_CHECK(weight.sym_size(1) == width, kOp, ": the weight of layer ", l, " must be [N, K=", width, "] to match ",
                l ? "the layer before" : "input", ", got ", weight.sym_sizes());
    width = weight.sym_size(0);
    if (!bias) continue;
    check_like(kOp, *bias, "a bias", input, "input");
    TORCH_CHECK(bias->sym_size(0) == width, kOp, ": the bias of layer ", l, " must be [N=", width,
                "] to match its weight, got ", bias->sym_sizes());
  }
  if (step.loss == kCrossEntropy) {
    step.target_is_classes = target.scalar_type() == at::kLong;
    TORCH_CHECK_VALUE(0 <= label_smoothing && label_smoothing <= 1, kOp, ": label_smoothing must be from 0 to 1, got ",
                      label_smoothing);
    if (step.loss_weight) {
      check_like(kOp, *step.loss_weight, "loss_weight", input, "input");
      TORCH_CHECK(step.loss_weight->dim() == 1 && step.loss_weight->sym_size(0) == width, kOp,
                  ": loss_weight must be [N=", width, "], one for each class, got ", step.loss_weight->sym_sizes());
    }
  } else {
    TORCH_CHECK(!step.loss_weight && label_smoothing == 0, kOp, ": ", loss,
                " takes neither loss_weight nor label_smoothing");
  }
  check_target(step, *step.layers.back().weight.value);
  set_hyperparameters(step.layers, momentum_buffers, learning, hyperparameters);
  check_memory(step);
  for (const StepLayer& layer : step.layers) {
    if (layer.weight.sgd || layer.bias.sgd) break;
    ++step.lowest_learning;
  }
  return step;
}

bool is_contiguous(const Step& step) {
  for (const StepLayer& layer : step.layers)
    for (const StepParameter& p : {layer.weight, layer.bias})
      for (const at::Tensor* t : {p.value, p.momentum_buffer})
        if (t && !t->is_contiguous()) return false;
  return true;
}

void bump_versions(at::TensorList parameters, at::TensorList momentum_buffers, at::IntArrayRef learning) {
  for (const int64_t place : learning) parameters[place].unsafeGetTensorImpl()->bump_version();
  for (const at::Tensor& buffer : momentum_buffers) buffer.unsafeGetTensorImpl()->bump_version();
}

void check_classes(const Step& step) {
  const at::Tensor &t = step.target, ignored = t.eq(step.ignore_index);
  const int64_t N = step.layers.back().weight.value->size(0);
  const at::Tensor wrong = t.lt(0).logical_or(t.ge(N)).logical_and(ignored.logical_not());
  TORCH_CHECK_INDEX(!wrong.any().item<bool>(), kOp, ": target must be classes from 0 to ", N - 1, " or ignore_index ",
                    step.ignore_index, ", got ", t.masked_select(wrong)[0].item<int64_t>());
}

void throw_not_a_probability() {
  TORCH_CHECK(false, kOp,
              ": bce needs outputs and targets between 0 and 1; end the model with a Sigmoid, or use "
              "BCEWithLogitsLoss; nothing was changed");
}

namespace {

// On CUDA torch's own kernels assert it on the device: to ask here would wait, and could not be captured in a graph.
bool asserted_on_device(const Step& step) { return step.input.is_cuda(); }

LossAndGrad cross_entropy(const Step& step, const at::Tensor& z) {
  const int64_t N = z.size(1);
  const at::Tensor w = step.loss_weight ? *step.loss_weight : at::ones({N}, z.options());
  at::Tensor q, count, ignored;
  if (step.target_is_classes) {
    if (!asserted_on_device(step)) check_classes(step);
    ignored = step.target.eq(step.ignore_index);
    const at::Tensor classes = step.target.masked_fill(ignored, 0);
    const at::Tensor weights = w.index_select(0, classes).masked_fill(ignored, 0);
    q = (w * (step.label_smoothing / N)).expand_as(z).masked_fill(ignored.unsqueeze(1), 0);
    q = q.scatter_add(1, classes.unsqueeze(1), (weights * (1 - step.label_smoothing)).unsqueeze(1));
    count = weights.sum();
  } else {
    q = w * (step.target * (1 - step.label_smoothing) + step.label_smoothing / N);
    count = at::full_like(w.sum(), z.size(0));
  }
  const at::Tensor log_p = at::log_softmax(z, 1);
  at::Tensor terms = q * log_p;
  if (step.target_is_classes) terms = terms.masked_fill(q.eq(0), 0);  // 0 log 0; torch never looks at these
  at::Tensor loss = -terms.sum();
  if (step.mean) {
    loss = loss / count;
    q = q / count;
    if (step.target_is_classes) q = q.masked_fill(ignored.unsqueeze(1), 0);  // if all are: no gradient, though 0 / 0
  }
  return {loss, log_p.exp() * q.sum(1, true) - q};
}

}  // namespace

LossAndGrad loss_and_grad_native(const Step& step, const at::Tensor& y) {
  const auto reduction = step.mean ? at::Reduction::Mean : at::Reduction::Sum;
  const at::Tensor &t = step.target, one = at::ones({}, y.options());
  switch (step.loss) {
    case kMSE:
      return {at::mse_loss(y, t, reduction), at::mse_loss_backward(one, y, t, reduction)};
    case kBCE: {
      const auto outside = [](const at::Tensor& p) { return p.ge(0).logical_and(p.le(1)).logical_not().any(); };
      if (!asserted_on_device(step) && outside(y).logical_or(outside(t)).item<bool>()) throw_not_a_probability();
      return {at::binary_cross_entropy(y, t, {}, reduction),
              at::binary_cross_entropy_backward(one, y, t, {}, reduction)};
    }
    case kCrossEntropy:
      return cross_entropy(step, y);
    default: {
      const at::Tensor dz = at::sigmoid(y) - t;
      return {at::binary_cross_entropy_with_logits(y, t, {}, {}, reduction), step.mean ? dz / y.numel() : dz};
    }
  }
}

namespace {

void update(const StepParameter& p, at::Tensor g) {
  const Sgd& h = *p.sgd;
  if (h.maximize) g = -g;
  if (h.weight_decay != 0) g = g.add(*p.value, h.weight_decay);
  if (h.momentum != 0) {
    p.momentum_buffer->mul_(h.momentum).add_(g, 1 - h.dampening);
    g = h.nesterov ? g.add(*p.momentum_buffer, h.momentum) : *p.momentum_buffer;
  }
  p.value->sub_(g, h.lr);
}

std::string_view activation_name(size_t index) {
  return visit_activation(index, [](auto act) { return std::string_view(act.name); });
}

}  // namespace

at::Tensor step_by_layers(const Step& step, LossAndGrad (*loss_and_grad)(const Step&, const at::Tensor&)) {
  const auto optional = [](const at::Tensor* t) { return t ? std::optional<at::Tensor>(*t) : std::nullopt; };
  std::vector<at::Tensor> outputs{step.input};  // of each layer, after its input
  for (const StepLayer& layer : step.layers)
    outputs.push_back(
        linear_act(outputs.back(), *layer.weight.value, optional(layer.bias.value), activation_name(layer.activation)));
  auto [loss, dy] = loss_and_grad(step, outputs.back());
  for (size_t l = step.layers.size(); l-- > step.lowest_learning;) {
    const StepLayer& layer = step.layers[l];
    const auto [dx, dw, db] =
        linear_act_backward(dy, outputs[l + 1], outputs[l], *layer.weight.value, activation_name(layer.activation),
                            {l > step.lowest_learning, layer.weight.sgd.has_value(), layer.bias.sgd.has_value()});
    if (layer.weight.sgd) update(layer.weight, dw);
    if (layer.bias.sgd) update(layer.bias, db);
    dy = dx;
  }
  return loss;
}

at::Tensor step_native(const Step& step) { return step_by_layers(step, loss_and_grad_native); }

at::Tensor mlp_sgd_step_(const at::Tensor& input, const at::Tensor& target, at::TensorList parameters,
                         at::TensorList momentum_buffers, const c10::List<std::string>& activations,
                         std::string_view loss, std::string_view reduction,
                         const std::optional<at::Tensor>& loss_weight, int64_t ignore_index, double label_smoothing,
                         at::IntArrayRef learning, at::ArrayRef<double> hyperparameters) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mlp_ext::mlp_sgd_step_", "").typed<decltype(mlp_sgd_step_)>();
  return op.call(input, target, parameters, momentum_buffers, activations, loss, reduction, loss_weight, ignore_index,
                 label_smoothing, learning, hyperparameters);
}

namespace {

at::Tensor step_meta(const Step& step) { return at::empty({}, step.input.options()); }

// Below autograd, like an update under no_grad: parameters that require a gradient change in place.
at::Tensor step_autograd(const at::Tensor& input, const at::Tensor& target, at::TensorList parameters,
                         at::TensorList momentum_buffers, const c10::List<std::string>& activations,
                         std::string_view loss, std::string_view reduction,
                         const std::optional<at::Tensor>& loss_weight, int64_t ignore_index, double label_smoothing,
                         at::IntArrayRef learning, at::ArrayRef<double> hyperparameters) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const at::Tensor result = mlp_sgd_step_(input, target, parameters, momentum_buffers, activations, loss, reduction,
                                          loss_weight, ignore_index, label_smoothing, learning, hyperparameters);
  bump_versions(parameters, momentum_buffers, learning);
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mlp_ext, m) {
  m.def(
      "mlp_sgd_step_(Tensor input, Tensor target, Tensor(a!)[] parameters, Tensor(b!)[] momentum_buffers, "
      "str[] activations, str loss, str reduction, Tensor? loss_weight, int ignore_index, float label_smoothing, "
      "int[] learning, float[] hyperparameters) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(mlp_ext, CompositeExplicitAutograd, m) { m.impl("mlp_sgd_step_", checked_step<step_native>); }
TORCH_LIBRARY_IMPL(mlp_ext, Meta, m) { m.impl("mlp_sgd_step_", checked_step<step_meta>); }
TORCH_LIBRARY_IMPL(mlp_ext, Autograd, m) { m.impl("mlp_sgd_step_", step_autograd); }

}  // namespace mlp_ext
