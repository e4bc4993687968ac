// The operator mlp_train_many_: schema, argument checks, composite of mlp_train_step_'s backends.
#include "ops/train_many.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/aminmax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>

#include "ops/checks.h"

namespace mlp_ext {

namespace {

constexpr const char* kTrainMany = "mlp_train_many_";

// Splits a list whose elements belong to one network after another.
template <class List>
class Split {
 public:
  Split(List list, const char* name) : list_(list), name_(name) {}
  List next(size_t count) {
    TORCH_CHECK(taken_ + count <= list_.size(), kTrainMany, ": ", name_,
                " must be those of all networks, and there are only ", list_.size());
    return list_.slice(std::exchange(taken_, taken_ + count), count);
  }
  void check_all_taken() const {
    TORCH_CHECK(taken_ == list_.size(), kTrainMany, ": ", name_, " must be those of all networks, ", taken_, ", got ",
                list_.size());
  }

 private:
  List list_;
  const char* name_;
  size_t taken_ = 0;
};

// Number of states of parameters that learn with these hyperparameters.
size_t count_states(std::string_view optimizer, Numbers hyperparameters) {
  size_t count = 0;
  visit(Optimizers{}, index_of(optimizer, Optimizers{}), [&](auto functor) {
    using Functor = decltype(functor);
    for (size_t i = 0; i < hyperparameters.size(); i += Functor::parameters.size())
      for (size_t s = 0; s < Functor::states.size(); ++s)
        count += make<Functor>(&hyperparameters[i]).has_state(s) ? 1 : 0;
  });
  return count;
}

// One for all networks, or the slices along the first dimension of a tensor with one for each.
std::vector<at::Tensor> slices(const at::Tensor& t, int64_t dim, int64_t networks, const char* name) {
  if (t.dim() == dim) return {t};
  TORCH_CHECK(t.dim() == dim + 1 && t.size(0) == networks, kTrainMany, ": ", name, " must have ", dim,
              " dimensions, or ", dim + 1, " of which the first is networks=", networks, ", got ", t.sym_sizes());
  return t.unbind();
}

void check_order(const at::Tensor& order, const TrainManyArgs& args, int64_t input_rows) {
  TORCH_CHECK(order.device() == args.input.device(), kTrainMany, ": orders must be on ", args.input.device(),
              " to match input, got ", order.device());
  TORCH_CHECK_TYPE(order.scalar_type() == at::kLong, kTrainMany, ": orders must be int64, got ",
                   dtype_name(order.scalar_type()));
  TORCH_CHECK(order.dim() == 2 && order.size(0) == args.epochs, kTrainMany, ": orders must be [epochs=", args.epochs,
              ", n], got ", order.sizes());
  check_allocated(kTrainMany, order, "orders");
  if (!order.is_cpu() || order.numel() == 0) return;  // a GPU's kernels assert it
  const auto [least, most] = at::aminmax(order);
  TORCH_CHECK_INDEX(least.item<int64_t>() >= 0 && most.item<int64_t>() < input_rows, kTrainMany,
                    ": orders must be indices among ", input_rows, " rows of input, got ", least.item<int64_t>(),
                    " to ", most.item<int64_t>());
}

// Before any network is trained. Rows that none trains on may have any class.
void check_classes(const TrainingOfMany& many) {
  const Training& first = many.networks[0].training;
  if (!first.target_is_classes || !first.target.is_cpu()) return;
  const auto valid = [&](const at::Tensor& t) { return check_classes(first, t, false); };
  if (std::all_of(many.targets.begin(), many.targets.end(), valid)) return;
  for (const auto& [training, order] : many.networks)
    check_classes(training, order ? training.target.index_select(0, order->flatten()) : training.target);
}

}  // namespace

TrainingOfMany check_training_of_many(const TrainManyArgs& args) {
  const int64_t E = args.networks;
  TORCH_CHECK_VALUE(E >= 1 && args.epochs >= 1 && args.batch_size >= 1, kTrainMany,
                    ": networks, epochs and batch_size must be from 1 on, got ", E, ", ", args.epochs, " and ",
                    args.batch_size);
  TORCH_CHECK(args.parameters.size() % E == 0, kTrainMany, ": parameters must be as many for each of ", E,
              " networks, got ", args.parameters.size());
  const size_t count = args.parameters.size() / E, optimizer = check_optimizer(kTrainMany, args.optimizer);
  const auto [each, has_steps] = visit(Optimizers{}, optimizer, [](auto functor) {
    using Functor = decltype(functor);
    return std::pair(Functor::parameters.size(), Functor::counts_steps);
  });
  const size_t numbers = args.learning.size() * each, counts = has_steps ? args.learning.size() : 0;
  const bool of_rows =
      is_of_rows_loss(LossFunction(check_choice(kTrainMany, Losses{}, args.loss, args.loss_parameters, "loss")));
  const int64_t target_dim = of_rows && args.target.scalar_type() == at::kLong ? 1 : 2;

  TrainingOfMany many{slices(args.input, 2, E, "input"),
                      slices(args.target, target_dim, E, "target"),
                      {},
                      args.epochs,
                      args.batch_size};
  TORCH_CHECK(args.orders.empty() || args.orders.size() == 1 || static_cast<int64_t>(args.orders.size()) == E,
              kTrainMany, ": orders must be none, one, or one for each of ", E, " networks, got ", args.orders.size());
  for (const at::Tensor& order : args.orders) check_order(order, args, many.inputs[0].size(0));
  Split parameters(args.parameters, "parameters"), states(args.states, "states"), steps(args.steps, "steps");
  Split hyperparameters(args.hyperparameters, "hyperparameters");
  many.networks.reserve(E);
  for (int64_t e = 0; e < E; ++e) {
    const auto of = [e](const auto& list) -> const at::Tensor& { return list[list.size() == 1 ? 0 : e]; };
    const Numbers own = hyperparameters.next(numbers);
    many.networks.push_back(
        {check_training({of(many.inputs), of(many.targets), parameters.next(count),
                         states.next(count_states(args.optimizer, own)), steps.next(counts), args.activations,
                         args.activation_parameters, args.loss, args.reduction, args.loss_weight, args.loss_parameters,
                         args.optimizer, args.learning, own, std::nullopt, std::nullopt, args.dropout}),
         args.orders.empty() ? nullptr : &of(args.orders)});
    const Training &training = many.networks.back().training, &first = many.networks[0].training;
    for (size_t l = 0; l < training.layers.size(); ++l) {
      const at::Tensor &w = *training.layers[l].weight.value, &other = *first.layers[l].weight.value;
      TORCH_CHECK(w.sizes() == other.sizes() && !training.layers[l].bias.value == !first.layers[l].bias.value,
                  kTrainMany, ": parameters of network ", e, " must be like those of network 0");
    }
  }
  parameters.check_all_taken();
  states.check_all_taken();
  steps.check_all_taken();
  hyperparameters.check_all_taken();
  check_classes(many);
  std::vector<const Training*> all;
  for (const TrainedNetwork& network : many.networks) all.push_back(&network.training);
  check_memory(all);
  return many;
}

namespace {

thread_local FailedNetworks* failed_networks = nullptr;

}  // namespace

FailedNetworks::FailedNetworks() : outer_(std::exchange(failed_networks, this)) {}
FailedNetworks::~FailedNetworks() { failed_networks = outer_; }

void NetworkErrors::rethrow() const {
  const auto first = std::find_if(errors_.begin(), errors_.end(), [](const auto& error) { return error != nullptr; });
  if (first == errors_.end()) return;
  if (failed_networks) {
    for (size_t i = 0; i < errors_.size(); ++i)
      if (errors_[i]) failed_networks->networks.push_back(i);
    failed_networks->first_error = *first;
    return;
  }
  try {
    std::rethrow_exception(*first);
  } catch (c10::Error& e) {
    e.add_context(c10::str("network ", first - errors_.begin(), "; the others were trained"));
    throw;
  }
}

void train_one(const TrainingOfMany& many, const TrainedNetwork& network, const at::Tensor& losses,
               at::Tensor (*train)(const Training&)) {
  const int64_t batches = losses.size(0) / many.epochs;
  for (int64_t epoch = 0; epoch < many.epochs; ++epoch) {
    Training training = network.training;
    const at::Tensor order = network.order ? network.order->select(0, epoch) : at::Tensor();
    training.order = network.order ? &order : nullptr;
    training.batch_size = many.batch_size;
    const at::Tensor found = train(training);
    losses.narrow(0, epoch * batches, found.size(0)).copy_(found);
  }
}

at::Tensor train_in_turn(const TrainingOfMany& many, at::Tensor (*train)(const Training&)) {
  const auto count = static_cast<int64_t>(many.networks.size());
  const at::Tensor losses = at::zeros({count, many.epochs * many.batches()}, many.inputs[0].options());
  NetworkErrors errors(count);
  for (int64_t i = 0; i < count; ++i)
    errors.run(i, [&] { train_one(many, many.networks[i], losses.select(0, i), train); });
  errors.rethrow();
  return losses;
}

namespace {

at::Tensor train_many_native(const TrainingOfMany& many) { return train_in_turn(many, train_native); }

}  // namespace

at::Tensor mlp_train_many_(const TrainManyArgs& a) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mlp_ext::mlp_train_many_", "")
                             .typed<decltype(train_many_kernel<train_many_native>)>();
  return op.call(a.input, a.target, a.parameters, a.states, a.steps, a.activations, a.activation_parameters, a.loss,
                 a.reduction, a.loss_weight, a.loss_parameters, a.optimizer, a.learning, a.hyperparameters, a.orders,
                 a.networks, a.epochs, a.batch_size, a.dropout);
}

namespace {

at::Tensor train_many_meta(const TrainingOfMany& many) {
  return at::empty({static_cast<int64_t>(many.networks.size()), many.epochs * many.batches()},
                   many.inputs[0].options());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mlp_ext, m) {
  m.def(
      "mlp_train_many_(Tensor input, Tensor target, Tensor(a!)[] parameters, Tensor(b!)[] states, Tensor(c!)[] steps, "
      "str[] activations, float[] activation_parameters, str loss, str reduction, Tensor? loss_weight, "
      "float[] loss_parameters, str optimizer, int[] learning, float[] hyperparameters, Tensor[] orders, int networks, "
      "int epochs, int batch_size, float[] dropout=[]) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(mlp_ext, CompositeExplicitAutograd, m) {
  m.impl("mlp_train_many_", train_many_kernel<train_many_native>);
}
TORCH_LIBRARY_IMPL(mlp_ext, Meta, m) { m.impl("mlp_train_many_", train_many_kernel<train_many_meta>); }
TORCH_LIBRARY_IMPL(mlp_ext, Autograd, m) { m.impl("mlp_train_many_", torch::CppFunction::makeFallthrough()); }

}  // namespace mlp_ext
