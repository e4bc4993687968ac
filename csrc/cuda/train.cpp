// mlp_sgd_step_ and _mlp_sgd_steps_ on a GPU: all of it in one launch where the plan says so, else layer by layer.
#include "ops/train.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cuda/tensors.h"
#include "math/losses.h"

namespace mlp_ext::cuda {

namespace {

bool in_one_block(const Step& step, int64_t batch) {
  c10::SmallVector<int64_t, 9> widths{step.input.size(1)};
  for (const StepLayer& layer : step.layers) widths.push_back(layer.weight.value->size(0));
  const int64_t layers = step.layers.size();
  const Properties& here = properties();
  const StepPlan plan =
      make_step_plan({widths.data(), layers, batch, dtype_of(step.input), here.arch, here.block_shared});
  return plan.path == StepPath::one_block && is_contiguous(step);
}

StepParameterProblem parameter(const mlp_ext::StepParameter& p) {
  if (!p.value) return {};
  return {p.value->data_ptr(), p.momentum_buffer ? p.momentum_buffer->mutable_data_ptr() : nullptr,
          p.sgd.value_or(Sgd()), p.sgd.has_value()};
}

// order: [rows] or undefined.
void launch(const Step& step, const at::Tensor& order, int64_t rows, int64_t batch, at::Tensor& losses) {
  const int64_t M = step.input.size(0), N = step.layers.back().weight.value->size(0);
  const at::Tensor x = as_rows(step.input, M, step.input.size(1));
  const at::Tensor target = step.target_is_classes ? step.target : as_rows(step.target, M, N);
  const at::Tensor weight = step.loss_weight ? step.loss_weight->contiguous() : at::Tensor();
  StepsProblem problem{};
  problem.dtype = dtype_of(x);
  problem.rows = rows;
  problem.batch = batch;
  problem.order = order.defined() ? order.const_data_ptr<int64_t>() : nullptr;
  problem.input_rows = M;
  problem.x = matrix(x);
  problem.loss = step.loss;
  problem.mean = step.mean;
  if (step.target_is_classes) {
    problem.classes = target.const_data_ptr<int64_t>();
    problem.classes_stride = target.stride(0);
  } else {
    problem.target = matrix(target);
  }
  problem.loss_weight = weight.defined() ? weight.const_data_ptr() : nullptr;
  problem.ignore_index = step.ignore_index;
  problem.label_smoothing = step.label_smoothing;
  problem.losses = losses.mutable_data_ptr();
  problem.layers = step.layers.size();
  problem.lowest_learning = step.lowest_learning;
  for (size_t l = 0; l < step.layers.size(); ++l) {
    const StepLayer& layer = step.layers[l];
    const at::Tensor& w = *layer.weight.value;
    problem.layer[l] = {w.size(1), w.size(0), layer.activation, parameter(layer.weight), parameter(layer.bias)};
  }
  C10_CUDA_CHECK(launch_sgd_steps(problem, gpu()));
}

LossAndGrad loss_and_grad(const Step& step, const at::Tensor& y) {
  if (step.loss == kCrossEntropy || y.numel() == 0) return loss_and_grad_native(step, y);
  const int64_t M = y.size(0), N = y.size(1);
  const at::Tensor target = as_rows(step.target, M, N);
  LossAndGrad result{at::empty({}, y.options()), at::empty({M, N}, y.options())};
  const LossProblem problem{dtype_of(y),
                            step.loss,
                            M,
                            N,
                            matrix(y),
                            matrix(target),
                            {data(result.dy), N},
                            step.mean ? 1.0 / static_cast<double>(y.numel()) : 1.0,
                            data(result.loss)};
  const Gpu here = gpu();
  const at::Tensor workspace = bytes(element_loss_bytes(problem, here), y);
  C10_CUDA_CHECK(launch_element_loss(problem, data(workspace), here));
  return result;
}

at::Tensor step(const Step& step) {
  const Guard guard(step.input);
  const int64_t M = step.input.size(0);
  if (!in_one_block(step, M)) return step_by_layers(step, loss_and_grad);
  at::Tensor loss = at::empty({}, step.input.options());
  launch(step, {}, M, M, loss);
  return loss;
}

at::Tensor steps(const at::Tensor& input, const at::Tensor& target, at::TensorList parameters,
                 at::TensorList momentum_buffers, const c10::List<std::string>& activations, std::string_view loss,
                 std::string_view reduction, const std::optional<at::Tensor>& loss_weight, int64_t ignore_index,
                 double label_smoothing, at::IntArrayRef learning, at::ArrayRef<double> hyperparameters,
                 const std::optional<at::Tensor>& order, int64_t batch_size) {
  const Step step = check_step(input, target, parameters, momentum_buffers, activations, loss, reduction, loss_weight,
                               ignore_index, label_smoothing, learning, hyperparameters);
  const int64_t rows = check_batches(input, order, batch_size).expect_int();
  const int64_t batch = std::clamp<int64_t>(rows, 1, batch_size);
  const Guard guard(input);
  if (!in_one_block(step, batch))
    return mlp_sgd_steps_native(input, target, parameters, momentum_buffers, activations, loss, reduction, loss_weight,
                                ignore_index, label_smoothing, learning, hyperparameters, order, batch_size);
  at::Tensor losses = at::empty({(rows + batch - 1) / batch}, input.options());
  launch(step, order ? order->contiguous() : at::Tensor(), rows, batch, losses);
  return losses;
}

}  // namespace

TORCH_LIBRARY_IMPL(mlp_ext, CUDA, m) {
  m.impl("mlp_sgd_step_", checked_step<step>);
  m.impl("_mlp_sgd_steps_", steps);
}

}  // namespace mlp_ext::cuda
