// Training steps as a composite of native operations: the reference, and what runs where no kernel of ours does.
#include <ATen/TensorOperators.h>
#include <ATen/ops/binary_cross_entropy.h>
#include <ATen/ops/binary_cross_entropy_backward.h>
#include <ATen/ops/binary_cross_entropy_with_logits.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/huber_loss.h>
#include <ATen/ops/huber_loss_backward.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/l1_loss.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/mse_loss.h>
#include <ATen/ops/mse_loss_backward.h>
#include <ATen/ops/native_dropout.h>
#include <ATen/ops/native_dropout_backward.h>
#include <ATen/ops/nll_loss_backward.h>
#include <ATen/ops/nll_loss_forward.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sign.h>
#include <ATen/ops/smooth_l1_loss.h>
#include <ATen/ops/smooth_l1_loss_backward.h>
#include <ATen/ops/sqrt.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "ops/linear_act.h"
#include "ops/train.h"

namespace mlp_ext {

template <>
struct ConstantOf<at::Tensor> {
  using type = double;
};

namespace {

std::optional<at::Tensor> optional(const at::Tensor* t) { return t ? std::optional<at::Tensor>(*t) : std::nullopt; }

// On CUDA torch's own kernels assert it on the device: to ask here would wait, and could not be captured in a graph.
bool asserted_on_device(const Training& training) { return training.input.is_cuda(); }

// ---- the losses: an overload for each that PyTorch has ----

// What they are computed from. The gradient of a loss is what its backward makes of dy = 1.
struct Operands {
  const Training& training;
  const at::Tensor &y, &t;
  const int64_t reduction = training.mean ? at::Reduction::Mean : at::Reduction::Sum;
  const at::Tensor dy = at::ones({}, y.options());

  // The gradient of a mean from that of a sum.
  at::Tensor reduced(const at::Tensor& gradient) const { return training.mean ? gradient / y.numel() : gradient; }
};

// A loss of elements without an overload: its own formula, element by element.
template <class Loss>
LossAndGrad native(const Loss& loss, const Operands& o) {
  static_assert(!is_of_rows<Loss>, "a loss of rows needs an overload");
  const auto doubles = [](const at::Tensor& t) { return t.to(at::kCPU, at::kDouble).contiguous(); };
  const at::Tensor* const weight = o.training.loss_weight;
  const at::Tensor y = doubles(o.y), t = doubles(o.t), w = doubles((weight ? *weight : o.dy).expand_as(o.y)),
                   dy = at::empty_like(y);
  const double scale = o.training.mean ? 1 / static_cast<double>(y.numel()) : 1;
  double total = 0;
  for (int64_t i = 0; i < y.numel(); ++i) {
    const auto at = [i](const at::Tensor& operand) { return operand.const_data_ptr<double>()[i]; };
    if (is_of_probabilities<Loss> && !(at(y) >= 0 && at(y) <= 1 && at(t) >= 0 && at(t) <= 1)) throw_not_a_probability();
    total += loss.forward(at(y), at(t), at(w));
    dy.mutable_data_ptr<double>()[i] = loss.backward(at(y), at(t), at(w), scale);
  }
  return {at::full_like(o.dy, total * scale), dy.to(o.y.options())};
}

LossAndGrad native(const MSE&, const Operands& o) {
  return {at::mse_loss(o.y, o.t, o.reduction), at::mse_loss_backward(o.dy, o.y, o.t, o.reduction)};
}

LossAndGrad native(const BCE&, const Operands& o) {
  const auto outside = [](const at::Tensor& p) { return p.ge(0).logical_and(p.le(1)).logical_not().any(); };
  if (!asserted_on_device(o.training) && outside(o.y).logical_or(outside(o.t)).item<bool>()) throw_not_a_probability();
  return {at::binary_cross_entropy(o.y, o.t, {}, o.reduction),
          at::binary_cross_entropy_backward(o.dy, o.y, o.t, {}, o.reduction)};
}

LossAndGrad native(const BCEWithLogits& loss, const Operands& o) {
  const at::Tensor* const weight = o.training.loss_weight;
  const at::Tensor dz = weight ? loss.backward(o.y, o.t, *weight, o.dy) : at::sigmoid(o.y) - o.t;
  return {at::binary_cross_entropy_with_logits(o.y, o.t, {}, optional(weight), o.reduction), o.reduced(dz)};
}

LossAndGrad native(const L1&, const Operands& o) {
  return {at::l1_loss(o.y, o.t, o.reduction), o.reduced(at::sign(o.y - o.t))};
}

LossAndGrad native(const SmoothL1& loss, const Operands& o) {
  if (loss.beta == 0) return native(L1{}, o);  // as torch: the gradient at y = t is 0
  return {at::smooth_l1_loss(o.y, o.t, o.reduction, loss.beta),
          at::smooth_l1_loss_backward(o.dy, o.y, o.t, o.reduction, loss.beta)};
}

LossAndGrad native(const Huber& loss, const Operands& o) {
  return {at::huber_loss(o.y, o.t, o.reduction, loss.delta),
          at::huber_loss_backward(o.dy, o.y, o.t, o.reduction, loss.delta)};
}

// Torch has no backward of its whole. The class weights w, smoothed targets q, and dz = sum(q) softmax(z) - q.
LossAndGrad native(const CrossEntropy& loss, const Operands& o) {
  const Training& training = o.training;
  const at::Tensor& z = o.y;
  const int64_t N = z.size(1), ignore_index = ignore_index_of(training.loss);
  const at::Tensor w = training.loss_weight ? *training.loss_weight : at::ones({N}, z.options());
  at::Tensor q, count, ignored;
  if (training.target_is_classes) {
    if (!asserted_on_device(training)) check_classes(training, training.target);
    ignored = o.t.eq(ignore_index);
    const at::Tensor classes = o.t.masked_fill(ignored, 0);
    const at::Tensor weights = w.index_select(0, classes).masked_fill(ignored, 0);
    q = (w * (loss.label_smoothing / N)).expand_as(z).masked_fill(ignored.unsqueeze(1), 0);
    q = q.scatter_add(1, classes.unsqueeze(1), (weights * (1 - loss.label_smoothing)).unsqueeze(1));
    count = weights.sum();
  } else {
    q = w * (o.t * (1 - loss.label_smoothing) + loss.label_smoothing / N);
    count = at::full_like(w.sum(), z.size(0));
  }
  const at::Tensor log_p = at::log_softmax(z, 1);
  at::Tensor terms = q * log_p;
  if (training.target_is_classes) terms = terms.masked_fill(q.eq(0), 0);  // 0 log 0; torch never looks at these
  at::Tensor sum = -terms.sum();
  if (training.mean) {
    sum = sum / count;
    q = q / count;
    if (training.target_is_classes) q = q.masked_fill(ignored.unsqueeze(1), 0);  // no gradient, though 0 / 0 if all are
  }
  return {sum, log_p.exp() * q.sum(1, true) - q};
}

LossAndGrad native(const NLL&, const Operands& o) {
  if (!asserted_on_device(o.training)) check_classes(o.training, o.training.target);
  const auto weight = optional(o.training.loss_weight);
  const int64_t ignore_index = ignore_index_of(o.training.loss);
  const auto [loss, total] = at::nll_loss_forward(o.y, o.t, weight, o.reduction, ignore_index);
  return {loss, at::nll_loss_backward(o.dy, o.y, o.t, weight, o.reduction, ignore_index, total)};
}

// ---- the update ----

// The functor whose begin_step takes a tensor; only for those whose begin_step does something.
template <class Functor>
struct OfTensors {};
template <template <class, class> class Functor>
struct OfTensors<Functor<double, double>> {
  using type = Functor<double, at::Tensor>;
};

// f(the optimizer, ready for the parameter's next step), by tensors where its count of steps is on a device.
template <class F>
void with_next_step(const TrainedParameter& p, const F& f) {
  visit(*p.optimizer, [&](auto optimizer) {
    if constexpr (requires { typename OfTensors<decltype(optimizer)>::type; }) {
      if (!p.step->is_cpu()) {
        auto by_tensors = make<typename OfTensors<decltype(optimizer)>::type>(p.hyperparameters);
        by_tensors.begin_step(p.step->to(at::kDouble) + 1);
        return f(by_tensors);
      }
    }
    if (p.step && p.step->is_cpu()) optimizer.begin_step(count_of(*p.step) + 1);
    f(optimizer);
  });
}

// ---- dropout ----

// What F.dropout does in training mode, drawing from torch's generator as it does there.
class Dropout {
 public:
  at::Tensor forward(const at::Tensor& x, double p) {
    if (p == 0 || x.numel() == 0) return x;
    fused_ = x.is_cuda() && p < 1;
    if (fused_) {
      scale_ = 1 / (1 - p);
      auto [y, mask] = at::native_dropout(x, p, true);
      factor_ = mask;
      return y;
    }
    factor_ = p == 1 ? at::zeros({}, x.options()) : at::empty_like(x).bernoulli_(1 - p).div_(1 - p);
    return x * factor_;
  }
  at::Tensor backward(const at::Tensor& dy) const {
    if (!factor_.defined()) return dy;
    return fused_ ? at::native_dropout_backward(dy, factor_, scale_) : dy * factor_;
  }

 private:
  at::Tensor factor_;  // or mask
  double scale_ = 1;
  bool fused_ = false;
};

// A parameter and its states after the update. In float32 at least, each result rounded once.
struct Updated {
  const TrainedParameter& parameter;
  at::Tensor value, states[kMaxStates];

  explicit Updated(const Gradient& g) : parameter(*g.parameter) {
    const auto dtype = parameter.value->scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    value = parameter.value->to(dtype);
    for (size_t s = 0; s < kMaxStates; ++s)
      if (parameter.states[s]) states[s] = parameter.states[s]->to(dtype);
    with_next_step(parameter, [&](const auto& optimizer) { optimizer.update(value, states, g.gradient.to(dtype)); });
  }
  void write() const {
    parameter.value->copy_(value);
    for (size_t s = 0; s < kMaxStates; ++s)
      if (parameter.states[s]) parameter.states[s]->copy_(states[s]);
  }
};

}  // namespace

// All is computed before the first is written, where memory may run out; on a GPU, to take less of it, one parameter
// after another, as torch.optim does.
void update_native(at::ArrayRef<Gradient> gradients) {
  if (gradients.empty()) return;
  const size_t at_once = gradients[0].parameter->value->is_cuda() ? 1 : gradients.size();
  for (size_t begin = 0; begin < gradients.size(); begin += at_once) {
    std::vector<Updated> updated;
    for (const Gradient& g : gradients.slice(begin, at_once)) updated.emplace_back(g);
    for (const Updated& u : updated) u.write();
  }
}

LossAndGrad loss_and_grad_native(const Training& training, const at::Tensor& y) {
  const Operands operands{training, y, training.target};
  return visit(training.loss, [&](const auto& loss) { return native(loss, operands); });
}

at::Tensor cast_native(const at::Tensor& t, at::ScalarType dtype) { return t.to(dtype); }

at::Tensor step_by_layers(const Training& training, const LayerStep& step) {
  const size_t L = training.layers.size();
  std::vector<Dropout> dropout(training.dropout.empty() ? 0 : L + 1);
  const auto dropped = [&](const at::Tensor& x, size_t l) {
    return dropout.empty() ? x : dropout[l].forward(x, training.dropout[l]);
  };
  const auto dtype = training.input.scalar_type(), layer_dtype = training.autocast.value_or(dtype);
  at::Tensor y;
  std::vector<at::Tensor> inputs, weights;          // of each layer, as it computes with them
  std::vector<std::optional<at::Tensor>> saved(L);  // what each activation's backward needs
  for (size_t l = 0; l < L; ++l) {
    const TrainedLayer& layer = training.layers[l];
    inputs.push_back(step.cast(dropped(l > 0 ? y : training.input, l), layer_dtype));
    weights.push_back(step.cast(*layer.weight.value, layer_dtype));
    const at::Tensor& weight = weights[l];
    const auto bias = layer.bias.value ? std::optional(step.cast(*layer.bias.value, layer_dtype)) : std::nullopt;
    const Needs needs = l >= training.lowest_learning ? needs_of(layer.activation) : Needs::nothing;
    if (needs == Needs::preactivation) {
      std::tie(y, saved[l]) =
          linear_act_forward(inputs[l], weight, bias, layer.activation_name, layer.activation_parameters);
    } else {
      y = linear_act(inputs[l], weight, bias, layer.activation_name, layer.activation_parameters);
      if (needs == Needs::output) saved[l] = y;
    }
  }
  auto [loss, dy] = step.loss_and_grad(training, step.cast(dropped(y, L), dtype));
  dy = step.cast(dy, layer_dtype);
  c10::SmallVector<Gradient, 16> gradients;
  for (size_t l = L; l-- > training.lowest_learning;) {
    const TrainedLayer& layer = training.layers[l];
    if (!dropout.empty()) dy = dropout[l + 1].backward(dy);
    const auto [dx, dw, db] = linear_act_backward(
        dy, saved[l], inputs[l], weights[l], layer.activation_name, layer.activation_parameters,
        {l > training.lowest_learning, layer.weight.optimizer.has_value(), layer.bias.optimizer.has_value()});
    if (layer.weight.optimizer) gradients.push_back({&layer.weight, dw});
    if (layer.bias.optimizer) gradients.push_back({&layer.bias, db});
    dy = dx;
  }
  step.update(gradients);
  for_learning(training, [](const TrainedParameter& p) {
    if (p.step) advance(*p.step);
  });
  return loss;
}

at::Tensor loop_over_batches(const Training& training, at::Tensor (*step)(const Training&)) {
  if (!training.batch_size) return step(training);
  const int64_t rows = training.rows();
  std::vector<at::Tensor> losses;
  for (int64_t begin = 0, size = 0; begin < rows; begin += size) {
    size = std::min(*training.batch_size, rows - begin);
    const auto batch = [&](const at::Tensor& t) {
      return training.order ? at::index_select(t, 0, training.order->narrow(0, begin, size)) : t.narrow(0, begin, size);
    };
    const at::Tensor input = batch(training.input), target = batch(training.target);
    losses.push_back(
        step({input, target, training.loss_weight, nullptr, std::nullopt, training.layers, training.loss, training.mean,
              training.dropout, training.autocast, training.target_is_classes, training.lowest_learning}));
  }
  return losses.empty() ? at::empty({0}, training.input.options()) : at::stack(losses);
}

namespace {

at::Tensor step_native(const Training& training) { return step_by_layers(training); }

}  // namespace

at::Tensor train_native(const Training& training) { return loop_over_batches(training, step_native); }

}  // namespace mlp_ext
