// The operator _mlp_sgd_steps_: mlp_sgd_step_ over batch after batch, for devices that do many steps at once.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/stack.h>
#include <torch/library.h>

#include "ops/train.h"

namespace mlp_ext {

c10::SymInt check_batches(const at::Tensor& input, const std::optional<at::Tensor>& order, int64_t batch_size) {
  constexpr const char* kOp = "_mlp_sgd_steps_";
  TORCH_CHECK_VALUE(batch_size >= 1, kOp, ": batch_size must be from 1 on, got ", batch_size);
  if (!order) return input.sym_size(0);
  TORCH_CHECK(order->device() == input.device(), kOp, ": order must be on ", input.device(), " to match input, got ",
              order->device());
  TORCH_CHECK_TYPE(order->scalar_type() == at::kLong, kOp, ": order must be int64");
  TORCH_CHECK(order->dim() == 1, kOp, ": order must be places [rows] among those of input, got ", order->sym_sizes());
  return order->sym_size(0);
}

at::Tensor mlp_sgd_steps_native(const at::Tensor& input, const at::Tensor& target, at::TensorList parameters,
                                at::TensorList momentum_buffers, const c10::List<std::string>& activations,
                                std::string_view loss, std::string_view reduction,
                                const std::optional<at::Tensor>& loss_weight, int64_t ignore_index,
                                double label_smoothing, at::IntArrayRef learning, at::ArrayRef<double> hyperparameters,
                                const std::optional<at::Tensor>& order, int64_t batch_size) {
  check_step(input, target, parameters, momentum_buffers, activations, loss, reduction, loss_weight, ignore_index,
             label_smoothing, learning, hyperparameters);
  const int64_t rows = check_batches(input, order, batch_size).expect_int();
  std::vector<at::Tensor> losses;
  for (int64_t begin = 0; begin < rows; begin += batch_size) {
    const int64_t size = std::min(batch_size, rows - begin);
    const auto batch = [&](const at::Tensor& t) {
      return order ? at::index_select(t, 0, order->narrow(0, begin, size)) : t.narrow(0, begin, size);
    };
    losses.push_back(mlp_sgd_step_(batch(input), batch(target), parameters, momentum_buffers, activations, loss,
                                   reduction, loss_weight, ignore_index, label_smoothing, learning, hyperparameters));
  }
  return losses.empty() ? at::empty({0}, input.options()) : at::stack(losses);
}

at::Tensor mlp_sgd_steps_(const at::Tensor& input, const at::Tensor& target, at::TensorList parameters,
                          at::TensorList momentum_buffers, const c10::List<std::string>& activations,
                          std::string_view loss, std::string_view reduction,
                          const std::optional<at::Tensor>& loss_weight, int64_t ignore_index, double label_smoothing,
                          at::IntArrayRef learning, at::ArrayRef<double> hyperparameters,
                          const std::optional<at::Tensor>& order, int64_t batch_size) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mlp_ext::_mlp_sgd_steps_", "").typed<decltype(mlp_sgd_steps_)>();
  return op.call(input, target, parameters, momentum_buffers, activations, loss, reduction, loss_weight, ignore_index,
                 label_smoothing, learning, hyperparameters, order, batch_size);
}

namespace {

at::Tensor steps_meta(const at::Tensor& input, const at::Tensor& target, at::TensorList parameters,
                      at::TensorList momentum_buffers, const c10::List<std::string>& activations, std::string_view loss,
                      std::string_view reduction, const std::optional<at::Tensor>& loss_weight, int64_t ignore_index,
                      double label_smoothing, at::IntArrayRef learning, at::ArrayRef<double> hyperparameters,
                      const std::optional<at::Tensor>& order, int64_t batch_size) {
  check_step(input, target, parameters, momentum_buffers, activations, loss, reduction, loss_weight, ignore_index,
             label_smoothing, learning, hyperparameters);
  const c10::SymInt rows = check_batches(input, order, batch_size);
  const c10::SymInt in_last = rows % batch_size;  // 0 where the last batch is full
  return at::empty_symint({rows / batch_size + in_last.min(1)}, input.options());
}

// Below autograd, like the updates under no_grad: parameters that require a gradient change in place.
at::Tensor steps_autograd(const at::Tensor& input, const at::Tensor& target, at::TensorList parameters,
                          at::TensorList momentum_buffers, const c10::List<std::string>& activations,
                          std::string_view loss, std::string_view reduction,
                          const std::optional<at::Tensor>& loss_weight, int64_t ignore_index, double label_smoothing,
                          at::IntArrayRef learning, at::ArrayRef<double> hyperparameters,
                          const std::optional<at::Tensor>& order, int64_t batch_size) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const at::Tensor losses =
      mlp_sgd_steps_(input, target, parameters, momentum_buffers, activations, loss, reduction, loss_weight,
                     ignore_index, label_smoothing, learning, hyperparameters, order, batch_size);
  bump_versions(parameters, momentum_buffers, learning);
  return losses;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mlp_ext, m) {
  m.def(
      "_mlp_sgd_steps_(Tensor input, Tensor target, Tensor(a!)[] parameters, Tensor(b!)[] momentum_buffers, "
      "str[] activations, str loss, str reduction, Tensor? loss_weight, int ignore_index, float label_smoothing, "
      "int[] learning, float[] hyperparameters, Tensor? order, int batch_size) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(mlp_ext, CompositeExplicitAutograd, m) { m.impl("_mlp_sgd_steps_", mlp_sgd_steps_native); }
TORCH_LIBRARY_IMPL(mlp_ext, Meta, m) { m.impl("_mlp_sgd_steps_", steps_meta); }
TORCH_LIBRARY_IMPL(mlp_ext, Autograd, m) { m.impl("_mlp_sgd_steps_", steps_autograd); }

}  // namespace mlp_ext
