// The class mlp_ext._C.Trainer, implementation of TrainStep: reads the optimizer and calls mlp_train_step_, once or
// over epochs and batches. In C++ because preparing a step in Python would take longer than a small network's step.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/utils/pybind.h>

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ops/train.h"
#include "python/device_steps.h"
#include "python/gradients.h"
#include "python/guards.h"
#include "python/optimizer_state.h"
#include "python/step_data.h"

namespace mlp_ext {

using Step = std::function<at::Tensor(const at::Tensor&, const at::Tensor&)>;  // input, target -> loss

// What Trainer is made of, beside the parameters and the optimizer.
struct Recipe {
  Names activations;
  std::vector<double> activation_parameters;
  std::string loss, reduction;
  std::optional<at::Tensor> loss_weight;
  std::vector<double> loss_parameters;
  std::vector<double> dropout;  // see TrainArgs
};

inline void check_loss_weight(const Recipe& recipe) {
  const std::optional<at::Tensor>& weight = recipe.loss_weight;
  if (!weight) return;
  TORCH_CHECK_VALUE(!weight->requires_grad(),
                    "TrainStep: the criterion's weight requires a gradient, which a step does not ",
                    "compute; detach it, or use the eager loop");
  TORCH_CHECK(weight->layout() == at::kStrided, "TrainStep: the criterion's weight must be dense, got ",
              weight->layout());
}

class Trainer {
 public:
  Trainer(const pybind11::sequence& parameters, std::vector<int64_t> groups, Recipe recipe, StepDataReader data,
          const pybind11::object& optimizer, std::string optimizer_name,
          const std::map<std::string, double>& optimizer_defaults, pybind11::object guards,
          std::shared_ptr<Gradients> gradients, pybind11::object average)
      : recipe_(std::move(recipe)),
        data_(std::move(data)),
        optimizer_(optimizer, std::move(optimizer_name), optimizer_defaults, parameters, std::move(groups)),
        gradients_(std::move(gradients)),
        average_(std::move(average)),
        guards_object_(std::move(guards)),
        guards_(guards_object_.cast<const Guards*>()) {
    for (size_t i = 0; i < optimizer_.size(); ++i) hooks_.push_back(hooks(optimizer_.parameter(i)));
  }

  // Whether model, criterion and optimizer are unchanged since this was made.
  bool is_current() const {
    if (!guards_ || !guards_->holds()) return false;
    for (size_t i = 0; i < optimizer_.size(); ++i)
      if (hooks(optimizer_.parameter(i)) != hooks_[i]) return false;
    return true;
  }

  const Recipe& recipe() const { return recipe_; }
  const StepDataReader& data() const { return data_; }
  const OptimizerReader& optimizer() const { return optimizer_; }
  OneCall one_call(const char* name) const { return gradients_->one_call(name); }

  // Whether gradients are summed, averaged or clipped before the update.
  bool by_gradients() const { return !gradients_->is_plain() || !average_.is_none(); }

  // Runs a step and returns the loss; does nothing and returns none unless is_current(). graph: None or see
  // captured().
  std::optional<at::Tensor> step(const pybind11::object& input, const pybind11::object& target,
                                 const pybind11::object& graph) {
    if (!is_current()) return std::nullopt;
    const OneCall call = one_call("TrainStep");
    OptimizerState now = optimizer_.read();
    const auto [x, y, promoted, rows_of_one] = read(input, target, now);
    at::Tensor loss;
    if (by_gradients()) {
      const pybind11::gil_scoped_release no_gil;
      loss = step_by_gradients(x, y, now);
    } else if (!graph.is_none() && !now.is_first_step()) {
      optimizer_.run_step(now, [&] { loss = captured(graph, now)(x, y); });
    } else {
      loss = run_step(now, args(x, y, now, now.steps));
    }
    return promoted ? loss.to(at::kDouble) : loss;
  }

  // Returns one loss per epoch, the mean over its rows, or the sum. Does nothing and returns none unless is_current().
  std::optional<std::vector<double>> fit(const pybind11::object& input, const pybind11::object& target, int64_t epochs,
                                         int64_t batch_size, bool shuffle,
                                         const std::optional<at::Generator>& generator,
                                         const pybind11::object& after_epoch, const pybind11::object& graph,
                                         bool at_once);

  // For Python's garbage collector: a model may hold the step that trains it.
  int traverse(visitproc visit, void* arg) const {
    Py_VISIT(guards_object_.ptr());
    Py_VISIT(average_.ptr());
    return optimizer_.traverse(visit, arg);
  }
  void clear() {
    guards_ = nullptr;
    guards_object_ = average_ = pybind11::object();
    optimizer_.clear();
  }

 private:
  friend class TrainingRun;

  TrainArgs args(const at::Tensor& input, const at::Tensor& target, const OptimizerState& now, at::TensorList steps,
                 const std::optional<at::Tensor>& order = {}, std::optional<int64_t> batch_size = {}) const {
    return {input,
            target,
            now.parameters,
            now.states,
            steps,
            recipe_.activations,
            recipe_.activation_parameters,
            recipe_.loss,
            recipe_.reduction,
            recipe_.loss_weight,
            recipe_.loss_parameters,
            optimizer_.name(),
            now.learning,
            now.hyperparameters,
            order,
            batch_size,
            recipe_.dropout,
            autocast_dtype(input)};
  }

  // A step, and what it does to the optimizer. Needs the GIL.
  at::Tensor run_step(OptimizerState& now, const TrainArgs& args) const {
    at::Tensor loss;
    optimizer_.run_step(now, [&] {
      const pybind11::gil_scoped_release no_gil;
      loss = mlp_train_step_(args);
    });
    return loss;
  }

  // A step whose gradients go to gradients_, and the update if it completes a group. Without the GIL.
  at::Tensor step_by_gradients(const at::Tensor& x, const at::Tensor& y, OptimizerState& now) {
    gradients_->begin_step(now);
    const c10::SmallVector<double, 16> scales(now.learning.size(), gradients_->scale());
    TrainArgs sums = args(x, y, now, {});
    sums.states = gradients_->views();
    sums.optimizer = Accumulate<>::name;
    sums.hyperparameters = scales;
    const at::Tensor loss = mlp_train_step_(sums);
    if (gradients_->end_step()) update(now);
    return loss;
  }

  // Averages, clips and applies the gradients of a group. Without the GIL.
  void update(OptimizerState& now) {
    gradients_->end_group();
    if (!average_.is_none()) {
      const pybind11::gil_scoped_acquire gil;
      average_(gradients_->flat());
    }
    gradients_->clip();
    c10::SmallVector<at::Tensor, 16> learning;
    for (const int64_t index : now.learning) learning.push_back(now.parameters[index]);
    const pybind11::gil_scoped_acquire gil;
    optimizer_.run_step(now, [&] {
      const pybind11::gil_scoped_release no_gil;
      mlp_train_update_({learning, now.states, now.steps, gradients_->views(), optimizer_.name(), now.hyperparameters});
    });
  }

  // A step through the Python function graph(step, key, input, target), which calls step or replays its capture for
  // that key. Not for the first step, which creates states. Needs the GIL.
  Step captured(const pybind11::object& graph, const OptimizerState& now) {
    const auto steps = device_steps_.copies(now);
    const pybind11::object step = pybind11::cpp_function(torch::wrap_pybind_function_no_gil(
        [this, alive = pybind11::cast(this), now, steps](const at::Tensor& x, const at::Tensor& y) {
          return mlp_train_step_(args(x, y, now, steps));
        }));
    return [this, graph, step, key = key(now, steps), &now](const at::Tensor& x, const at::Tensor& y) {
      device_steps_.copies(now);
      at::Tensor loss;
      try {
        loss = graph(step, key, x, y).cast<at::Tensor>();
      } catch (...) {
        device_steps_.advance_if_done(now);
        throw;
      }
      device_steps_.advance(now);
      bump_versions(args(x, y, now, now.steps));  // autograd does not see a replay
      return loss;
    };
  }

  // Everything that a captured step depends on, apart from its arguments.
  pybind11::bytes key(const OptimizerState& now, at::TensorList steps) const {
    std::string key(reinterpret_cast<const char*>(now.hyperparameters.data()),
                    now.hyperparameters.size() * sizeof(double));
    const auto add = [&key](int64_t v) { key.append(reinterpret_cast<const char*>(&v), sizeof(v)); };
    for (const int64_t index : now.learning) add(index);
    add(static_cast<int64_t>(at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL)));
    add(at::globalContext().deterministicAlgorithms());
    add(static_cast<int64_t>(autocast_dtype(now.parameters[0]).value_or(at::kFloat)));
    for (const at::TensorList tensors : {at::TensorList(now.parameters), at::TensorList(now.states), steps}) {
      add(static_cast<int64_t>(tensors.size()));
      for (const at::Tensor& t : tensors) {
        add(reinterpret_cast<int64_t>(t.const_data_ptr()));
        for (const int64_t stride : t.strides()) add(stride);
      }
    }
    if (recipe_.loss_weight) add(reinterpret_cast<int64_t>(recipe_.loss_weight->const_data_ptr()));
    return key;
  }

  // Throws if a step cannot take the data now.
  StepData read(const pybind11::object& input, const pybind11::object& target, const OptimizerState& now) const {
    StepData data = data_.read(input, target, now.parameters[0].size(1));
    check_global_state(data.input, data.target, now.parameters);
    check_loss_weight(recipe_);
    TORCH_CHECK(recipe_.loss != BCE::name || !data.input.is_cuda() || !autocast_dtype(data.input),
                "TrainStep: under autocast PyTorch refuses BCELoss on cuda; end the model without its Sigmoid, and use "
                "BCEWithLogitsLoss");
    return data;
  }

  const Recipe recipe_;
  const StepDataReader data_;
  std::vector<int> hooks_;  // per parameter
  OptimizerReader optimizer_;
  const std::shared_ptr<Gradients> gradients_;
  pybind11::object average_;  // None, or a Python function that averages a tensor over a process group
  pybind11::object guards_object_;
  const Guards* guards_;
  DeviceSteps device_steps_;
};

void bind_trainer(pybind11::module_& m);

}  // namespace mlp_ext
