// mlp_train_step_ and mlp_train_many_ on a GPU: all steps in one launch where the plan says so, else layer by layer.
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "cuda/tensors.h"
#include "ops/train_many.h"

namespace mlp_ext::cuda {

namespace {

bool in_one_block(const Training& training, int64_t batch, bool many) {
  const auto widths = training.widths();
  const int64_t layers = training.layers.size();
  const Device& here = device();
  const StepPlan plan =
      make_step_plan({widths.data(), layers, batch, dtype_of(training.input), here.arch, here.block_shared, many});
  return plan.path == StepPath::one_block && training.dropout.empty() && !training.autocast && is_contiguous(training);
}

const void* const_data(const at::Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }

// A count of steps on the CPU is a number of the launch, one on the GPU is read there.
StepParameterProblem parameter(const TrainedParameter& p) {
  StepParameterProblem problem{};
  if (!p.value) return problem;
  problem.value = p.value->data_ptr();
  if (!p.optimizer) return problem;
  problem.optimizer = *p.optimizer;
  p.put_states(problem.states);
  if (!p.step) return problem;
  if (p.step->is_cpu())
    problem.count = p.step->item<double>();
  else if (p.step->scalar_type() == at::kFloat)
    problem.float_count = p.step->const_data_ptr<float>();
  else
    problem.double_count = p.step->const_data_ptr<double>();
  return problem;
}

// What networks with the same layers share. loss_weight as weight_row makes it.
StepsProblem steps_problem(const Training& training, int64_t epochs, int64_t batch, int64_t batches,
                           const at::Tensor& loss_weight) {
  StepsProblem problem{};
  problem.dtype = dtype_of(training.input);
  problem.epochs = epochs;
  problem.batch = batch;
  problem.batches = batches;
  problem.input_rows = training.input.size(0);
  problem.loss = training.loss;
  problem.mean = training.mean;
  if (training.target_is_classes) problem.classes_stride = training.target.stride(0);
  problem.ignore_index = ignore_index_of(training.loss);
  problem.loss_weight = const_data(loss_weight);
  problem.layers = training.layers.size();
  problem.lowest_learning = training.lowest_learning;
  for (size_t l = 0; l < training.layers.size(); ++l) {
    const TrainedLayer& layer = training.layers[l];
    const at::Tensor& w = *layer.weight.value;
    problem.layer[l] = {w.size(1),
                        w.size(0),
                        layer.activation,
                        layer.bias.value != nullptr,
                        layer.weight.optimizer.has_value(),
                        layer.bias.optimizer.has_value()};
  }
  return problem;
}

// One network's own. The tensors that its rows are read from, as the kernel needs them, are kept until it is launched.
StepNetworkProblem network_problem(const Training& training, int64_t rows, const at::Tensor* order,
                                   const at::Tensor& losses, c10::SmallVectorImpl<at::Tensor>& kept) {
  const int64_t M = training.input.size(0), N = training.layers.back().weight.value->size(0);
  const auto keep = [&kept](at::Tensor t) -> const at::Tensor& { return kept.emplace_back(std::move(t)); };
  StepNetworkProblem problem{};
  problem.rows = rows;
  if (order) problem.order = keep(order->contiguous()).const_data_ptr<int64_t>();
  problem.x = matrix(keep(as_rows(training.input, M, training.input.size(1))));
  if (training.target_is_classes)
    problem.classes = training.target.const_data_ptr<int64_t>();
  else
    problem.target = matrix(keep(as_rows(training.target, M, N)));
  problem.losses = losses.mutable_data_ptr();
  for (size_t l = 0; l < training.layers.size(); ++l) {
    problem.parameters[2 * l] = parameter(training.layers[l].weight);
    problem.parameters[2 * l + 1] = parameter(training.layers[l].bias);
  }
  return problem;
}

// All steps in one launch; losses: [steps].
void launch(const Training& training, int64_t rows, int64_t batch, const at::Tensor& losses) {
  const int64_t steps = losses.numel();
  const at::Tensor weight = weight_row(training);
  c10::SmallVector<at::Tensor, 3> kept;
  const StepsProblem problem = steps_problem(training, 1, batch, steps, weight);
  C10_CUDA_CHECK(launch_train_steps(problem, network_problem(training, rows, training.order, losses, kept), gpu()));
  for_learning(training, [&](const TrainedParameter& p) {
    if (p.step) advance(*p.step, steps);
  });
}

LossAndGrad loss_and_grad(const Training& training, const at::Tensor& y) {
  if (is_of_rows_loss(training.loss) || y.numel() == 0) return loss_and_grad_native(training, y);
  const int64_t M = y.size(0), N = y.size(1);
  const at::Tensor outputs = as_rows(y, M, N), target = as_rows(training.target, M, N);
  const at::Tensor weight = weight_row(training);
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

at::Tensor step(const Training& training) { return step_by_layers(training, {.loss_and_grad = loss_and_grad}); }

at::Tensor train(const Training& training) {
  const Guard guard(training.input);
  const int64_t rows = training.rows();
  const int64_t batch = training.batch_size ? std::clamp<int64_t>(rows, 1, *training.batch_size) : rows;
  if (!in_one_block(training, batch, false)) return loop_over_batches(training, step);
  const auto options = training.input.options();
  const at::Tensor losses =
      training.batch_size ? at::empty({(rows + batch - 1) / batch}, options) : at::empty({}, options);
  launch(training, rows, batch, losses);
  return losses;
}

// All steps of these networks in one launch; losses: [networks, epochs * batches], of all networks.
void launch_many(const TrainingOfMany& many, at::ArrayRef<size_t> which, const at::Tensor& losses) {
  const Training& first = many.networks[which[0]].training;
  const auto count = static_cast<int64_t>(which.size());
  const at::Tensor weight = weight_row(first);
  const StepsProblem problem = steps_problem(first, many.epochs, many.batch_size, many.batches(), weight);
  // Pinned, so that the copy does not wait for the GPU; the allocator keeps it until the copy is done.
  const at::Tensor on_host =
      at::empty({network_table_bytes(problem, count)}, at::TensorOptions(at::kByte).pinned_memory(true));
  c10::SmallVector<at::Tensor> kept;
  std::vector<at::Tensor> counts;
  std::vector<at::Scalar> steps;
  for (int64_t i = 0; i < count; ++i) {
    const TrainedNetwork& network = many.networks[which[i]];
    const int64_t rows = network.rows(), done = many.epochs * ((rows + many.batch_size - 1) / many.batch_size);
    const at::Tensor own_losses = losses.select(0, static_cast<int64_t>(which[i]));
    put_network(problem, count, i, network_problem(network.training, rows, network.order, own_losses, kept),
                on_host.mutable_data_ptr());
    for_learning(network.training, [&](const TrainedParameter& p) {
      if (!p.step) return;
      counts.push_back(*p.step);
      steps.emplace_back(done);
    });
  }
  const at::Tensor table = bytes(on_host.numel(), losses);
  table.copy_(on_host, /*non_blocking=*/true);
  C10_CUDA_CHECK(launch_train_networks(problem, count, table.const_data_ptr(), gpu()));
  if (!counts.empty()) at::_foreach_add_(counts, steps);
}

// Together those that fit a block, whatever the others are; the rest one after another.
at::Tensor train_many(const TrainingOfMany& many) {
  const Guard guard(many.inputs[0]);
  const auto count = static_cast<int64_t>(many.networks.size());
  const at::Tensor losses = at::zeros({count, many.epochs * many.batches()}, many.inputs[0].options());
  std::vector<size_t> together, apart;
  for (size_t i = 0; i < many.networks.size(); ++i) {
    // By batch_size, not by the rows of this call: a short last batch alone takes the same path.
    const bool fits = in_one_block(many.networks[i].training, many.batch_size, true);
    (fits ? together : apart).push_back(i);
  }
  if (!together.empty()) launch_many(many, together, losses);
  NetworkErrors errors(many.networks.size());
  for (const size_t i : apart)
    errors.run(i, [&] { train_one(many, many.networks[i], losses.select(0, static_cast<int64_t>(i)), train); });
  errors.rethrow();
  return losses;
}

}  // namespace

TORCH_LIBRARY_IMPL(mlp_ext, CUDA, m) {
  m.impl("mlp_train_step_", train_kernel<train>);
  m.impl("mlp_train_many_", train_many_kernel<train_many>);
}

}  // namespace mlp_ext::cuda
