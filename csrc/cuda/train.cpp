// mlp_train_step_ on a GPU: all steps in one launch where the plan says so, else layer by layer.
#include "ops/train.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "cuda/tensors.h"

namespace mlp_ext::cuda {

namespace {

bool in_one_block(const Training& training, int64_t batch) {
  c10::SmallVector<int64_t, 9> widths{training.input.size(1)};
  for (const TrainedLayer& layer : training.layers) widths.push_back(layer.weight.value->size(0));
  const int64_t layers = training.layers.size();
  const Properties& here = properties();
  const StepPlan plan =
      make_step_plan({widths.data(), layers, batch, dtype_of(training.input), here.arch, here.block_shared});
  return plan.path == StepPath::one_block && training.dropout.empty() && is_contiguous(training);
}

// loss_weight as [N]; undefined without one.
at::Tensor weight_row(const Training& training, int64_t N) {
  return training.loss_weight ? training.loss_weight->reshape({-1}).expand({N}).contiguous() : at::Tensor();
}

const void* const_data(const at::Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }

// A count of steps on the CPU is a number of the launch, one on the GPU is read there.
StepParameterProblem parameter(const TrainedParameter& p) {
  StepParameterProblem problem{};
  if (!p.value) return problem;
  problem.value = p.value->data_ptr();
  problem.learns = p.optimizer.has_value();
  if (!problem.learns) return problem;
  problem.optimizer = *p.optimizer;
  for (size_t s = 0; s < kMaxStates; ++s) problem.states[s] = p.states[s] ? p.states[s]->mutable_data_ptr() : nullptr;
  if (!p.step) return problem;
  if (p.step->is_cpu())
    problem.count = p.step->item<double>();
  else if (p.step->scalar_type() == at::kFloat)
    problem.float_count = p.step->const_data_ptr<float>();
  else
    problem.double_count = p.step->const_data_ptr<double>();
  return problem;
}

// All steps in one launch; losses: [steps].
void launch(const Training& training, int64_t rows, int64_t batch, const at::Tensor& losses) {
  const int64_t M = training.input.size(0), N = training.layers.back().weight.value->size(0);
  const at::Tensor x = as_rows(training.input, M, training.input.size(1));
  const at::Tensor target = training.target_is_classes ? training.target : as_rows(training.target, M, N);
  const at::Tensor weight = weight_row(training, N);
  const at::Tensor order = training.order ? training.order->contiguous() : at::Tensor();
  StepsProblem problem{};
  problem.dtype = dtype_of(x);
  problem.rows = rows;
  problem.batch = batch;
  problem.order = order.defined() ? order.const_data_ptr<int64_t>() : nullptr;
  problem.input_rows = M;
  problem.x = matrix(x);
  problem.loss = training.loss;
  problem.mean = training.mean;
  if (training.target_is_classes) {
    problem.classes = target.const_data_ptr<int64_t>();
    problem.classes_stride = target.stride(0);
  } else {
    problem.target = matrix(target);
  }
  problem.ignore_index = ignore_index_of(training.loss);
  problem.loss_weight = const_data(weight);
  problem.losses = losses.mutable_data_ptr();
  problem.layers = training.layers.size();
  problem.lowest_learning = training.lowest_learning;
  for (size_t l = 0; l < training.layers.size(); ++l) {
    const TrainedLayer& layer = training.layers[l];
    const at::Tensor& w = *layer.weight.value;
    problem.layer[l] = {w.size(1), w.size(0), layer.activation, parameter(layer.weight), parameter(layer.bias)};
  }
  C10_CUDA_CHECK(launch_train_steps(problem, gpu()));
  const int64_t steps = losses.numel();
  for_learning(training, [&](const TrainedParameter& p) {
    if (p.step) p.step->add_(steps);
  });
}

LossAndGrad loss_and_grad(const Training& training, const at::Tensor& y) {
  if (is_of_rows_loss(training.loss) || y.numel() == 0) return loss_and_grad_native(training, y);
  const int64_t M = y.size(0), N = y.size(1);
  const at::Tensor outputs = as_rows(y, M, N), target = as_rows(training.target, M, N);
  const at::Tensor weight = weight_row(training, N);
  LossAndGrad result{at::empty({}, y.options()), at::empty({M, N}, y.options())};
  const LossProblem problem{dtype_of(y),
                            training.loss,
                            M,
                            N,
                            matrix(outputs),
                            matrix(target),
                            const_data(weight),
                            {data(result.dy), N},
                            training.mean ? 1.0 / static_cast<double>(y.numel()) : 1.0,
                            data(result.loss)};
  const Gpu here = gpu();
  const at::Tensor workspace = bytes(element_loss_bytes(problem, here), y);
  C10_CUDA_CHECK(launch_element_loss(problem, data(workspace), here));
  return result;
}

at::Tensor step(const Training& training) { return step_by_layers(training, loss_and_grad); }

at::Tensor train(const Training& training) {
  const Guard guard(training.input);
  const int64_t rows = training.rows();
  const int64_t batch = training.batch_size ? std::clamp<int64_t>(rows, 1, *training.batch_size) : rows;
  if (!in_one_block(training, batch)) return loop_over_batches(training, step);
  const auto options = training.input.options();
  const at::Tensor losses =
      training.batch_size ? at::empty({(rows + batch - 1) / batch}, options) : at::empty({}, options);
  launch(training, rows, batch, losses);
  return losses;
}

}  // namespace

TORCH_LIBRARY_IMPL(mlp_ext, CUDA, m) { m.impl("mlp_train_step_", train_kernel<train>); }

}  // namespace mlp_ext::cuda
