// mlp_train_many_ on the CPU: networks in the lanes of a vector, one network to a thread, or one after another.
#include "ops/train_many.h"

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "cpu/layer.h"
#include "cpu/machines.h"
#include "cpu/plan.h"
#include "cpu/team.h"
#include "cpu/train.h"
#include "cpu/variants.h"
#include "ops/checks.h"

namespace mlp_ext::cpu {

namespace {

ManyPath path_of(const TrainingOfMany& many) {
  const Training& training = many.networks[0].training;
  c10::SmallVector<int64_t, 9> widths{training.input.size(1)};
  for (const TrainedLayer& layer : training.layers) widths.push_back(layer.weight.value->size(0));
  const DType dtype = dtype_of(training.input);
  return make_many_plan(many.batch_size, {widths.data(), widths.size()}, item_size(dtype), dot_mode_of(dtype),
                        machine());
}

at::Tensor zero_losses(const TrainingOfMany& many) {
  const auto count = static_cast<int64_t>(many.networks.size());
  return at::zeros({count, many.epochs * many.batches()}, many.inputs[0].options());
}

// ---- cores ----

at::Tensor on_cores(const TrainingOfMany& many) {
  const at::Tensor losses = zero_losses(many);
  NetworkErrors errors;
  for_pieces(losses.size(0), [&](int64_t i) {
    const OnOneThread alone;
    errors.run(i, [&] { train_one(many, many.networks[i], losses.select(0, i), train); });
  });
  errors.rethrow();
  return losses;
}

at::Tensor train_many(const TrainingOfMany& many) {
  const ManyPath path = many.networks[0].training.dropout.empty() ? path_of(many) : ManyPath::turns;
  return path == ManyPath::turns ? train_in_turn(many, train) : on_cores(many);
}

}  // namespace

TORCH_LIBRARY_IMPL(mlp_ext, CPU, m) { m.impl("mlp_train_many_", train_many_kernel<train_many>); }

}  // namespace mlp_ext::cpu
