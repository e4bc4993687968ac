#include "python/networks.h"

#include <ATen/ops/index_select.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <iterator>
#include <utility>

#include "ops/train_many.h"

namespace py = pybind11;

namespace mlp_ext {

using at::Tensor;

Networks::Networks(const std::vector<const Trainer*>& trainers, const std::vector<size_t>& order) {
  members_.reserve(order.size());
  for (const size_t index : order) {
    OptimizerState now = trainers[index]->optimizer().read();
    if (members_.empty()) {
      learning_ = now.learning;
      parameters_.reserve(order.size() * now.parameters.size());
      states_.reserve(order.size() * now.states.size());
      steps_.reserve(order.size() * now.steps.size());
      hyperparameters_.reserve(order.size() * now.hyperparameters.size());
    }
    TORCH_CHECK_VALUE(now.learning == learning_, "mlp_train_many_: learning must be the same for all networks");
    for (const auto& [hyperparameter, value] : now.later)
      if (value != now.hyperparameters[hyperparameter])
        later_.push_back({members_.size(), hyperparameters_.size() + hyperparameter, value});
    members_.push_back({trainers[index], index, states_.size(), steps_.size(), std::move(now.created)});
    const auto append = [](auto& all, auto& own) {
      all.insert(all.end(), std::make_move_iterator(own.begin()), std::make_move_iterator(own.end()));
    };
    append(parameters_, now.parameters);
    append(states_, now.states);
    append(steps_, now.steps);
    append(hyperparameters_, now.hyperparameters);
  }
}

bool Networks::has_own_first_step(size_t begin, size_t end) const {
  return std::any_of(later_.begin(), later_.end(),
                     [&](const Later& later) { return begin <= later.member && later.member < end; });
}

// What belongs to the networks from begin to end, where each has as many.
template <class List>
auto Networks::equal_parts(const List& list, size_t begin, size_t end) const {
  const size_t count = list.size() / size();
  return c10::ArrayRef<typename List::value_type>(list).slice(begin * count, (end - begin) * count);
}

at::TensorList Networks::range(at::TensorList all, size_t Member::* start, size_t begin, size_t end) const {
  const size_t first = members_[begin].*start;
  return all.slice(first, (end < size() ? members_[end].*start : all.size()) - first);
}

// The part of t for networks begin to end: t itself if all share it (dim dimensions), else their slices of
// [networks, rows, ...].
Tensor Networks::of_range(const Tensor& t, int64_t dim, size_t begin, size_t end) const {
  if (t.dim() != dim + 1 || t.size(0) != static_cast<int64_t>(size())) return t;  // also what the operator refuses
  std::vector<int64_t> indices;
  for (size_t i = begin; i < end; ++i) indices.push_back(static_cast<int64_t>(index(i)));
  bool in_turn = true;
  for (size_t i = 0; i < indices.size(); ++i) in_turn = in_turn && indices[i] == indices[0] + static_cast<int64_t>(i);
  if (in_turn) return t.narrow(0, indices[0], static_cast<int64_t>(indices.size()));
  return at::index_select(t, 0, at::tensor(indices, at::dtype(at::kLong)).to(t.device()));
}

Tensor Networks::call(const StepData& data, const Work& work) const {
  const auto [begin, end, orders, epochs, batch_size] = work;
  const Recipe& recipe = members_[begin].trainer->recipe();
  return mlp_train_many_(
      {of_range(data.input, 2, begin, end), of_range(data.target, data.has_classes() ? 1 : 2, begin, end),
       equal_parts(parameters_, begin, end), range(states_, &Member::states, begin, end),
       range(steps_, &Member::steps, begin, end), recipe.activations, recipe.activation_parameters, recipe.loss,
       recipe.reduction, recipe.loss_weight, recipe.loss_parameters, members_[begin].trainer->optimizer().name(),
       learning_, equal_parts(hyperparameters_, begin, end), orders, static_cast<int64_t>(end - begin), epochs,
       batch_size, recipe.dropout});
}

void Networks::check(const StepData& data) const {
  StepData none = data;
  none.input = data.input.narrow(-2, 0, 0);
  const int64_t rows = data.target.dim() - (data.has_classes() ? 1 : 2);
  if (rows >= 0) none.target = data.target.narrow(rows, 0, 0);
  call(none, {0, size(), {}, 1, 1});
}

Tensor Networks::train(const StepData& data, const Work& work) {
  const auto [begin, end, orders, epochs, batch_size] = work;
  Tensor losses;
  run_step(begin, end, [&, begin = begin] {
    FailedNetworks failed;
    losses = call(data, work);
    for (const size_t i : failed.networks) members_[begin + i].has_failed = true;
    if (failed.first_error && index(begin + failed.networks[0]) < first_failed_) {
      first_failed_ = index(begin + failed.networks[0]);
      error_ = failed.first_error;
    }
  });
  return losses;
}

Tensor Networks::step_without_rows(const StepData& data) {
  check(data);
  std::vector<Tensor> losses;
  const auto step = [&](size_t i) {
    const Recipe& recipe = members_[i].trainer->recipe();
    const auto own = [&](const Tensor& t, int64_t dim) { return t.dim() == dim + 1 ? t.select(0, index(i)) : t; };
    losses.push_back(mlp_train_step_(
        {own(data.input, 2), own(data.target, data.has_classes() ? 1 : 2), equal_parts(parameters_, i, i + 1),
         range(states_, &Member::states, i, i + 1), range(steps_, &Member::steps, i, i + 1), recipe.activations,
         recipe.activation_parameters, recipe.loss, recipe.reduction, recipe.loss_weight, recipe.loss_parameters,
         members_[i].trainer->optimizer().name(), learning_, equal_parts(hyperparameters_, i, i + 1), std::nullopt,
         std::nullopt, recipe.dropout}));
  };
  for (size_t i = 0; i < size(); ++i) run_step(i, i + 1, [&] { step(i); });
  return at::stack(losses);
}

template <class F>
void Networks::run_step(size_t begin, size_t end, const F& step) {
  const auto is_new = [](const Member& member) { return !member.has_stepped; };
  if (std::none_of(members_.begin() + begin, members_.begin() + end, is_new)) return step();
  const py::gil_scoped_acquire gil;
  const auto take_back = [&](bool of_all) {
    for (size_t i = begin; i < end; ++i)
      if (of_all || members_[i].has_failed) members_[i].trainer->optimizer().take_back(members_[i].created);
  };
  try {
    for (size_t i = begin; i < end; ++i) members_[i].trainer->optimizer().begin_step(members_[i].created);
    const py::gil_scoped_release no_gil;
    step();
  } catch (...) {
    take_back(true);
    throw;
  }
  take_back(false);
  for (size_t i = begin; i < end; ++i) {
    members_[i].created.clear();
    members_[i].has_stepped = true;
  }
  const auto stepped = [&](const Later& later) { return begin <= later.member && later.member < end; };
  for (const Later& later : later_)
    if (stepped(later)) hyperparameters_[later.hyperparameter] = later.value;
  std::erase_if(later_, stepped);
}

void Networks::rethrow() const {
  if (!error_) return;
  try {
    std::rethrow_exception(error_);
  } catch (c10::Error& error) {
    error.add_context(c10::str("models[", first_failed_, "]; the others were trained"));
    throw;
  }
}

}  // namespace mlp_ext
