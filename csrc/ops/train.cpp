// The operators mlp_train_step_ and mlp_train_update_: schemas, argument checks, dispatcher calls.
#include "ops/train.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include <algorithm>

#include "ops/checks.h"

namespace mlp_ext {

namespace {

constexpr const char *kTrainStep = "mlp_train_step_", *kTrainUpdate = "mlp_train_update_";

// Groups parameters into layers: a weight has two dimensions, its bias follows and has one.
c10::SmallVector<TrainedLayer, 8> layers_of(const TrainArgs& args) {
  c10::SmallVector<TrainedLayer, 8> layers;
  for (size_t i = 0; i < args.parameters.size(); ++i) {
    const at::Tensor& p = args.parameters[i];
    const bool is_bias = p.dim() == 1 && !layers.empty() && !layers.back().bias.value;
    TORCH_CHECK(is_bias || p.dim() == 2, kTrainStep,
                ": parameters must be of each layer weight [N, K] and, if it has one, bias [N]; parameters[", i,
                "] is ", p.sym_sizes());
    if (!is_bias) layers.emplace_back();
    (is_bias ? layers.back().bias : layers.back().weight).value = &p;
  }
  TORCH_CHECK(!layers.empty(), kTrainStep, ": parameters must hold at least one weight [N, K]");
  TORCH_CHECK(layers.size() == args.activations.size(), kTrainStep, ": activations must be one for each of ",
              layers.size(), " layers, got ", args.activations.size());
  LayerParameters parameters(kTrainStep, args.activation_parameters);
  for (size_t l = 0; l < layers.size(); ++l) {
    TrainedLayer& layer = layers[l];
    layer.activation_name = name_at(args.activations, l);
    layer.activation_parameters = parameters.next(layer.activation_name);
    layer.activation =
        check_activation(kTrainStep, layer.activation_name, layer.activation_parameters, Element{"activations", l});
  }
  parameters.check_all_taken();
  return layers;
}

// The checks of torch's own losses.
template <class Loss>
void check_loss_parameters(const Loss& loss) {
  if constexpr (requires { loss.label_smoothing; })
    TORCH_CHECK_VALUE(0 <= loss.label_smoothing && loss.label_smoothing <= 1, kTrainStep,
                      ": label_smoothing must be from 0 to 1, got ", loss.label_smoothing);
  if constexpr (requires { loss.beta; })
    TORCH_CHECK(loss.beta >= 0, kTrainStep, ": beta must be from 0 on, got ", loss.beta);
  if constexpr (requires { loss.delta; })
    TORCH_CHECK(loss.delta > 0, kTrainStep, ": delta must be greater than 0, got ", loss.delta);
}

template <class Loss>
void check_loss_weight(const Loss&, const Training& training) {
  if constexpr (Loss::weight == LossWeight::none) {
    TORCH_CHECK(!training.loss_weight, kTrainStep, ": ", Loss::name, " takes no loss_weight");
  } else if (training.loss_weight) {
    const at::Tensor& weight = *training.loss_weight;
    const c10::SymInt N = training.layers.back().weight.value->sym_size(0);
    check_like(kTrainStep, weight, "loss_weight", training.input, "input");
    const bool is_row = weight.dim() == 1 && weight.sym_size(0) == N;
    if constexpr (Loss::weight == LossWeight::of_classes) {
      TORCH_CHECK(is_row, kTrainStep, ": loss_weight must be [N=", N, "], one for each class, got ",
                  weight.sym_sizes());
    } else {
      TORCH_CHECK(is_row || (weight.dim() <= 1 && weight.sym_numel() == 1), kTrainStep,
                  ": loss_weight must broadcast to [N=", N, "], got ", weight.sym_sizes());
    }
  }
}

template <class Loss>
void check_target(const Loss& loss, Training& training) {
  const at::Tensor &input = training.input, &target = training.target;
  if constexpr (is_of_rows<Loss>) {
    training.target_is_classes = target.scalar_type() == at::kLong;
    TORCH_CHECK_TYPE(training.target_is_classes || Loss::takes_probabilities, kTrainStep,
                     ": target must be [M=", input.sym_size(0), "] of classes of int64, got ",
                     dtype_name(target.scalar_type()));
  }
  if (training.target_is_classes) {
    TORCH_CHECK(target.device() == input.device(), kTrainStep, ": target must be on ", input.device(),
                " to match input, got ", target.device());
    TORCH_CHECK(target.dim() == 1 && target.sym_size(0) == input.sym_size(0), kTrainStep,
                ": target must be [M=", input.sym_size(0), "] of classes to match input ", input.sym_sizes(), ", got ",
                target.sym_sizes());
    check_allocated(kTrainStep, target, "target");
  } else {
    const c10::SymInt N = training.layers.back().weight.value->sym_size(0);
    check_like(kTrainStep, target, "target", input, "input");
    TORCH_CHECK(target.dim() == 2 && target.sym_size(0) == input.sym_size(0) && target.sym_size(1) == N, kTrainStep,
                ": target must be [M=", input.sym_size(0), ", N=", N, "] to match the output, got ",
                target.sym_sizes());
    if constexpr (requires { loss.ignore_index; })  // as torch
      TORCH_CHECK(loss.ignore_index < 0, kTrainStep, ": target must be classes with ignore_index ", loss.ignore_index,
                  ", got probabilities; leave out ignore_index");
  }
}

// Checks that t can be updated in place, before any other parameter is updated.
void check_writable(const char* op, const at::Tensor& t, const char* name) {
  TORCH_CHECK(!t.is_inference() || c10::InferenceMode::is_enabled(), op, ": ", name,
              " is an inference tensor, which cannot be updated");
  if (!t.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) at::assert_no_internal_overlap(t);
}

void check_step(const char* op, const at::Tensor& step, const at::Tensor& input) {
  check_defined(op, step, "a count of steps");
  TORCH_CHECK(step.sym_numel() == 1 && step.dim() == 0, op, ": a count of steps must be [], got ", step.sym_sizes());
  TORCH_CHECK_TYPE(step.scalar_type() == at::kFloat || step.scalar_type() == at::kDouble, op,
                   ": a count of steps must be float32 or float64, got ", dtype_name(step.scalar_type()));
  TORCH_CHECK(step.is_cpu() || step.device() == input.device(), op, ": a count of steps must be on the cpu or on ",
              input.device(), " to match input, got ", step.device());
  check_allocated(op, step, "a count of steps");
  check_writable(op, step, "a count of steps");
}

// Gives the parameters that learn their hyperparameters, states and steps.
template <class Functor>
void set_optimizer(const char* op, size_t index, at::ArrayRef<TrainedParameter*> learning, Numbers hyperparameters,
                   at::TensorList states, at::TensorList steps, const at::Tensor& input) {
  constexpr size_t count = Functor::parameters.size();
  static_assert(Functor::states.size() <= kMaxStates);
  TORCH_CHECK(hyperparameters.size() == learning.size() * count, op, ": hyperparameters must be ", count,
              " for each of ", learning.size(), " parameters that learn, got ", hyperparameters.size());
  size_t found = 0;
  for (size_t i = 0; i < learning.size(); ++i) {
    TrainedParameter& p = *learning[i];
    check_writable(op, *p.value, "a parameter");
    p.hyperparameters = &hyperparameters[i * count];
    const Functor optimizer = make<Functor>(p.hyperparameters);
    p.optimizer.emplace(index, optimizer);
    for (size_t s = 0; s < Functor::states.size(); ++s) {
      if (!optimizer.has_state(s)) continue;
      if (found++ >= states.size()) continue;  // counted for the message
      const at::Tensor& state = states[found - 1];
      check_like(op, state, "an optimizer state", *p.value, "input");
      TORCH_CHECK(state.sym_sizes() == p.value->sym_sizes(), op, ": an optimizer state must be ", p.value->sym_sizes(),
                  " like its parameter, got ", state.sym_sizes());
      check_writable(op, state, "an optimizer state");
      p.states[s] = &state;
    }
  }
  TORCH_CHECK(found == states.size(), op, ": states must be those of each parameter that learns with ", Functor::name,
              ", ", found, ", got ", states.size());
  const size_t counts = Functor::counts_steps ? learning.size() : 0;
  TORCH_CHECK(counts == steps.size(), op, ": steps must be one for each parameter that learns with ", Functor::name,
              ", ", counts, ", got ", steps.size());
  for (size_t i = 0; i < counts; ++i) {
    check_step(op, steps[i], input);
    learning[i]->step = &steps[i];
  }
}

c10::SmallVector<TrainedParameter*, 16> learning_of(Training& training, at::IntArrayRef learning) {
  c10::SmallVector<TrainedParameter*, 16> all, found;
  for (TrainedLayer& layer : training.layers) {
    all.push_back(&layer.weight);
    if (layer.bias.value) all.push_back(&layer.bias);
  }
  int64_t last = -1;
  for (const int64_t index : learning) {
    TORCH_CHECK(index > last && index < static_cast<int64_t>(all.size()), kTrainStep,
                ": learning must be rising indices among ", all.size(), " parameters, got ", learning);
    last = index;
    found.push_back(all[index]);
  }
  return found;
}

void check_dropout(const Training& training) {
  const Numbers dropout = training.dropout;
  TORCH_CHECK_VALUE(dropout.empty() || dropout.size() == training.layers.size() + 1, kTrainStep,
                    ": dropout must be one for each layer's input and one for the output, ", training.layers.size() + 1,
                    ", got ", dropout.size());
  for (const double p : dropout)
    TORCH_CHECK_VALUE(p >= 0 && p <= 1, kTrainStep, ": dropout must be from 0 to 1, got ", p);
}

void check_autocast(const Training& training) {
  if (!training.autocast) return;
  TORCH_CHECK_TYPE(*training.autocast == at::kBFloat16 || *training.autocast == at::kHalf, kTrainStep,
                   ": autocast must be bfloat16 or float16, got ", dtype_name(*training.autocast));
  TORCH_CHECK_TYPE(training.input.scalar_type() == at::kFloat, kTrainStep,
                   ": with autocast input must be float32, got ", dtype_name(training.input.scalar_type()));
}

void check_batches(const TrainArgs& args) {
  if (!args.batch_size) {
    TORCH_CHECK_VALUE(!args.order, kTrainStep, ": order needs a batch_size");
    return;
  }
  TORCH_CHECK_VALUE(*args.batch_size >= 1, kTrainStep, ": batch_size must be from 1 on, got ", *args.batch_size);
  if (!args.order) return;
  const at::Tensor& order = *args.order;
  TORCH_CHECK(order.device() == args.input.device(), kTrainStep, ": order must be on ", args.input.device(),
              " to match input, got ", order.device());
  TORCH_CHECK_TYPE(order.scalar_type() == at::kLong, kTrainStep, ": order must be int64, got ",
                   dtype_name(order.scalar_type()));
  TORCH_CHECK(order.dim() == 1, kTrainStep, ": order must be indices [rows] among those of input, got ",
              order.sym_sizes());
  check_allocated(kTrainStep, order, "order");
}

// The memory of tensors, each from its first element to its last.
class Spans {
 public:
  void add(const at::Tensor* t, const char* name, bool is_written) {
    if (!t || !t->has_storage() || t->is_meta() || t->numel() == 0) return;
    int64_t last = 0;  // element
    for (int64_t d = 0; d < t->dim(); ++d) last += (t->size(d) - 1) * t->stride(d);
    const char* const begin = static_cast<const char*>(t->const_data_ptr());
    spans_.push_back({begin, begin + (last + 1) * static_cast<int64_t>(t->element_size()), name, is_written});
  }
  void add(const TrainedParameter& p) {
    add(p.value, p.optimizer ? "a parameter that learns" : "a parameter", p.optimizer.has_value());
    for (const at::Tensor* state : p.states) add(state, "an optimizer state", true);
    add(p.step, "a count of steps", true);
  }

  void check(const char* op) {
    std::sort(spans_.begin(), spans_.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
    const Span *farthest = nullptr, *farthest_written = nullptr;  // among spans that begin before
    for (const Span& span : spans_) {
      const Span* const other = span.is_written ? farthest : farthest_written;
      if (other && other->end > span.begin) {
        const auto [first, second] = span.is_written ? std::pair(other, &span) : std::pair(&span, other);
        TORCH_CHECK(false, op, ": ", first->name, " must not share memory with ", second->name, "; pass a clone()");
      }
      if (!farthest || span.end > farthest->end) farthest = &span;
      if (span.is_written && (!farthest_written || span.end > farthest_written->end)) farthest_written = &span;
    }
  }

 private:
  struct Span {
    const char *begin, *end;
    const char* name;
    bool is_written;
  };
  c10::SmallVector<Span, 40> spans_;
};

}  // namespace

void check_memory(at::ArrayRef<const Training*> trainings) {
  Spans spans;
  for (const Training* training : trainings) {
    spans.add(&training->input, "input", false);
    spans.add(&training->target, "target", false);
    spans.add(training->loss_weight, "loss_weight", false);
    spans.add(training->order, "order", false);
    for (const TrainedLayer& layer : training->layers)
      for (const TrainedParameter* p : {&layer.weight, &layer.bias}) spans.add(*p);
  }
  spans.check(kTrainStep);
}

size_t check_optimizer(const char* op, std::string_view name) {
  const size_t index = index_of(name, Optimizers{});
  TORCH_CHECK_VALUE(index < Optimizers::size, op, ": optimizer must be one of ", names_of(Optimizers{}), ", got '",
                    name, "'");
  return index;
}

Training check_training(const TrainArgs& args) {
  const auto pointer = [](const std::optional<at::Tensor>& t) { return t ? &*t : nullptr; };
  Training training{args.input,
                    args.target,
                    pointer(args.loss_weight),
                    pointer(args.order),
                    args.batch_size,
                    layers_of(args),
                    check_choice(kTrainStep, Losses{}, args.loss, args.loss_parameters, "loss"),
                    args.reduction == "mean",
                    args.dropout,
                    args.autocast};
  const size_t optimizer = check_optimizer(kTrainStep, args.optimizer);
  TORCH_CHECK_VALUE(training.mean || args.reduction == "sum", kTrainStep, ": reduction must be mean or sum, got '",
                    args.reduction, "'");
  check_dtype(kTrainStep, args.input, "input");
  TORCH_CHECK(args.input.dim() == 2, kTrainStep, ": input must be [M, K], got ", args.input.sym_sizes());
  auto width = args.input.sym_size(1);
  for (size_t l = 0; l < training.layers.size(); ++l) {
    const at::Tensor &weight = *training.layers[l].weight.value, *const bias = training.layers[l].bias.value;
    check_like(kTrainStep, weight, "a weight", args.input, "input");
    TORCH_CHECK(weight.sym_size(1) == width, kTrainStep, ": the weight of layer ", l, " must be [N, K=", width,
                "] to match ", l ? "the layer before" : "input", ", got ", weight.sym_sizes());
    width = weight.sym_size(0);
    if (!bias) continue;
    check_like(kTrainStep, *bias, "a bias", args.input, "input");
    TORCH_CHECK(bias->sym_size(0) == width, kTrainStep, ": the bias of layer ", l, " must be [N=", width,
                "] to match its weight, got ", bias->sym_sizes());
  }
  visit(training.loss, [&](auto loss) {
    check_loss_parameters(loss);
    check_loss_weight(loss, training);
    check_target(loss, training);
  });
  const auto learning = learning_of(training, args.learning);
  visit(Optimizers{}, optimizer, [&](auto functor) {
    set_optimizer<decltype(functor)>(kTrainStep, optimizer, learning, args.hyperparameters, args.states, args.steps,
                                     args.input);
  });
  check_dropout(training);
  check_autocast(training);
  check_batches(args);
  for (const TrainedLayer& layer : training.layers) {
    if (layer.weight.optimizer || layer.bias.optimizer) break;
    ++training.lowest_learning;
  }
  return training;
}

bool is_contiguous(const Training& training) {
  bool all = true;
  const auto check = [&all](const at::Tensor* t) { all = all && (!t || t->is_contiguous()); };
  for (const TrainedLayer& layer : training.layers)
    for (const TrainedParameter* p : {&layer.weight, &layer.bias}) {
      check(p->value);
      for (const at::Tensor* state : p->states) check(state);
    }
  return all;
}

bool check_classes(const Training& training, const at::Tensor& classes, bool throws) {
  const int64_t ignore_index = ignore_index_of(training.loss), N = training.layers.back().weight.value->size(0);
  const at::Tensor ignored = classes.eq(ignore_index);
  const at::Tensor wrong = classes.lt(0).logical_or(classes.ge(N)).logical_and(ignored.logical_not());
  const bool valid = !wrong.any().item<bool>();
  TORCH_CHECK_INDEX(valid || !throws, kTrainStep, ": target must be classes from 0 to ", N - 1, " or ignore_index ",
                    ignore_index, ", got ", classes.masked_select(wrong)[0].item<int64_t>());
  return valid;
}

at::Tensor weight_row(const Training& training) {
  const int64_t N = training.layers.back().weight.value->size(0);
  return training.loss_weight ? training.loss_weight->reshape(-1).expand({N}).contiguous() : at::Tensor();
}

double count_of(const at::Tensor& step) {
  return step.scalar_type() == at::kFloat ? *step.const_data_ptr<float>() : *step.const_data_ptr<double>();
}

void advance(const at::Tensor& step, int64_t steps) {
  if (!step.is_cpu())
    step.add_(steps);
  else if (step.scalar_type() == at::kFloat)
    *step.mutable_data_ptr<float>() += static_cast<float>(steps);
  else
    *step.mutable_data_ptr<double>() += static_cast<double>(steps);
}

void throw_not_a_probability() {
  TORCH_CHECK(false, kTrainStep,
              ": bce needs outputs and targets between 0 and 1; end the model with a Sigmoid, or use "
              "BCEWithLogitsLoss");
}

at::Tensor mlp_train_step_(const TrainArgs& a) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mlp_ext::mlp_train_step_", "")
                             .typed<std::remove_pointer_t<decltype(train_kernel<train_native>)>>();
  return op.call(a.input, a.target, a.parameters, a.states, a.steps, a.activations, a.activation_parameters, a.loss,
                 a.reduction, a.loss_weight, a.loss_parameters, a.optimizer, a.learning, a.hyperparameters, a.order,
                 a.batch_size, a.dropout, a.autocast);
}

c10::SmallVector<TrainedParameter, 16> check_update(const UpdateArgs& args) {
  const size_t optimizer = check_optimizer(kTrainUpdate, args.optimizer), count = args.parameters.size();
  TORCH_CHECK(args.gradients.size() == count, kTrainUpdate, ": gradients must be one for each of ", count,
              " parameters, got ", args.gradients.size());
  c10::SmallVector<TrainedParameter, 16> checked(count);
  c10::SmallVector<TrainedParameter*, 16> learning;
  for (size_t i = 0; i < count; ++i) {
    const at::Tensor &p = args.parameters[i], &gradient = args.gradients[i];
    check_dtype(kTrainUpdate, p, "a parameter");
    check_like(kTrainUpdate, gradient, "a gradient", p, "its parameter");
    TORCH_CHECK(gradient.sym_sizes() == p.sym_sizes(), kTrainUpdate, ": a gradient must be ", p.sym_sizes(),
                " like its parameter, got ", gradient.sym_sizes());
    checked[i].value = &p;
    learning.push_back(&checked[i]);
  }
  if (count == 0) return checked;
  visit(Optimizers{}, optimizer, [&](auto functor) {
    set_optimizer<decltype(functor)>(kTrainUpdate, optimizer, learning, args.hyperparameters, args.states, args.steps,
                                     args.parameters[0]);
  });
  Spans spans;
  for (size_t i = 0; i < count; ++i) {
    spans.add(checked[i]);
    spans.add(&args.gradients[i], "a gradient", false);
  }
  spans.check(kTrainUpdate);
  return checked;
}

void mlp_train_update_(const UpdateArgs& a) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mlp_ext::mlp_train_update_", "")
                             .typed<decltype(update_kernel<update_native>)>();
  op.call(a.parameters, a.states, a.steps, a.gradients, a.optimizer, a.hyperparameters);
}

void bump_versions(const TrainArgs& args) {
  const auto bump = [](const at::Tensor& t) { t.unsafeGetTensorImpl()->bump_version(); };
  if (args.optimizer != Accumulate<>::name)
    for (const int64_t index : args.learning) bump(args.parameters[index]);
  for (const at::TensorList tensors : {args.states, args.steps})
    for (const at::Tensor& t : tensors) bump(t);
}

void bump_versions(const Training& training) {
  const auto bump = [](const at::Tensor* t) {
    if (t) t->unsafeGetTensorImpl()->bump_version();
  };
  for_learning(training, [&](const TrainedParameter& p) {
    if (p.optimizer->index != index_of(Accumulate<>::name, Optimizers{})) bump(p.value);
    for (const at::Tensor* state : p.states) bump(state);
    bump(p.step);
  });
}

namespace {

at::Tensor train_meta(const Training& training) {
  const auto options = training.input.options();
  if (!training.batch_size) return at::empty({}, options);
  const c10::SymInt rows = (training.order ? *training.order : training.input).sym_size(0);
  const c10::SymInt in_last = rows % *training.batch_size;  // 0 if the last batch is full
  return at::empty_symint({rows / *training.batch_size + in_last.min(1)}, options);
}

void update_meta(at::ArrayRef<Gradient>) {}

void throw_renamed(const c10::OperatorHandle&, c10::Stack*) {
  TORCH_CHECK(false, "mlp_sgd_step_: since mlp_ext 0.2 this is mlp_train_step_(..., optimizer=\"sgd\", ...)");
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mlp_ext, m) {
  m.def(
      "mlp_train_step_(Tensor input, Tensor target, Tensor(a!)[] parameters, Tensor(b!)[] states, Tensor(c!)[] steps, "
      "str[] activations, float[] activation_parameters, str loss, str reduction, Tensor? loss_weight, "
      "float[] loss_parameters, str optimizer, int[] learning, float[] hyperparameters, Tensor? order=None, "
      "int? batch_size=None, float[] dropout=[], ScalarType? autocast=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "mlp_train_update_(Tensor(a!)[] parameters, Tensor(b!)[] states, Tensor(c!)[] steps, Tensor[] gradients, "
      "str optimizer, float[] hyperparameters) -> ()",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "mlp_sgd_step_(Tensor input, Tensor target, Tensor(a!)[] parameters, Tensor(b!)[] momentum_buffers, "
      "str[] activations, str loss, str reduction, Tensor? loss_weight, int ignore_index, float label_smoothing, "
      "int[] learning, float[] hyperparameters) -> Tensor",
      torch::CppFunction::makeFromBoxedFunction<throw_renamed>());
}

TORCH_LIBRARY_IMPL(mlp_ext, CompositeExplicitAutograd, m) {
  m.impl("mlp_train_step_", train_kernel<train_native>);
  m.impl("mlp_train_update_", update_kernel<update_native>);
}
TORCH_LIBRARY_IMPL(mlp_ext, Meta, m) {
  m.impl("mlp_train_step_", train_kernel<train_meta>);
  m.impl("mlp_train_update_", update_kernel<update_meta>);
}
TORCH_LIBRARY_IMPL(mlp_ext, Autograd, m) {
  m.impl("mlp_train_step_", torch::CppFunction::makeFallthrough());
  m.impl("mlp_train_update_", torch::CppFunction::makeFallthrough());
}

}  // namespace mlp_ext
