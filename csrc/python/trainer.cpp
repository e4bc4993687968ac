// Implementation of TrainStep: reads the optimizer and calls mlp_train_step_, once or over epochs and batches. In C++
// because preparing a step in Python would take longer than a small network's step.
#include "python/trainer.h"

#include <ATen/Context.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/randperm.h>
#include <ATen/ops/stack.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <chrono>
#include <functional>
#include <utility>

#include "ops/train.h"
#include "python/device_steps.h"
#include "python/gradients.h"
#include "python/guards.h"
#include "python/optimizer_state.h"
#include "python/step_data.h"

namespace py = pybind11;

namespace mlp_ext {
namespace {

using at::Tensor;
using Clock = std::chrono::steady_clock;
using Step = std::function<Tensor(const Tensor&, const Tensor&)>;  // input, target -> loss

constexpr auto kBetweenSignals = std::chrono::milliseconds(50);
constexpr int64_t kStepsPerCall = 4096;
// Full-batch training passes the rows repeatedly as `order`, many steps per call. Each step then gathers its rows,
// which pays off for inputs up to these sizes: on a GPU if steps run in one launch, and on the CPU.
constexpr int64_t kRepeatedBytes = int64_t(1) << 20, kRepeatedBytesOnCpu = int64_t(16) << 10;
constexpr int64_t kRepeatedRows = int64_t(1) << 15;   // in an order; torch makes up to so many on one thread
constexpr int64_t kShuffledBytes = int64_t(8) << 20;  // of input gathered at a time

// Options of fit.
struct Epochs {
  int64_t count, batch_size;
  bool shuffle;
  const std::optional<at::Generator>& generator;
  const py::object& after_epoch;  // called with epoch and loss, unless None
  bool at_once;                   // many steps run in one launch
};

// What Trainer is made of, beside the parameters and the optimizer.
struct Recipe {
  Names activations;
  std::vector<double> activation_parameters;
  std::string loss, reduction;
  std::optional<Tensor> loss_weight;
  std::vector<double> loss_parameters;
  std::vector<double> dropout;  // see TrainArgs
};

class Trainer {
 public:
  Trainer(const py::sequence& parameters, std::vector<int64_t> groups, Recipe recipe, StepDataReader data,
          const py::object& optimizer, std::string optimizer_name,
          const std::map<std::string, double>& optimizer_defaults, py::object guards,
          std::shared_ptr<Gradients> gradients, py::object average)
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

  // Whether gradients are summed, averaged or clipped before the update.
  bool by_gradients() const { return !gradients_->is_plain() || !average_.is_none(); }

  // Runs a step and returns the loss; does nothing and returns none unless is_current(). graph: None or see
  // captured().
  std::optional<Tensor> step(const py::object& input, const py::object& target, const py::object& graph) {
    if (!is_current()) return std::nullopt;
    OptimizerState now = optimizer_.read();
    const auto [x, y, promoted, rows_of_one] = read(input, target, now);
    Tensor loss;
    if (by_gradients()) {
      const py::gil_scoped_release no_gil;
      loss = step_by_gradients(x, y, now);
    } else {
      if (!graph.is_none() && !now.is_first_step()) {
        loss = captured(graph, now)(x, y);
      } else {
        const py::gil_scoped_release no_gil;
        loss = mlp_train_step_(args(x, y, now, now.steps));
      }
      optimizer_.finish_step(now);
    }
    return promoted ? loss.to(at::kDouble) : loss;
  }

  // Returns one loss per epoch, the mean over its rows, or the sum. Does nothing and returns none unless is_current().
  std::optional<std::vector<double>> fit(const py::object& input, const py::object& target, int64_t epochs,
                                         int64_t batch_size, bool shuffle,
                                         const std::optional<at::Generator>& generator, const py::object& after_epoch,
                                         const py::object& graph, bool at_once);

  // For Python's garbage collector: a model may hold the step that trains it.
  int traverse(visitproc visit, void* arg) const {
    Py_VISIT(guards_object_.ptr());
    Py_VISIT(average_.ptr());
    return optimizer_.traverse(visit, arg);
  }
  void clear() {
    guards_ = nullptr;
    guards_object_ = average_ = py::object();
    optimizer_.clear();
  }

 private:
  friend class TrainingRun;

  TrainArgs args(const Tensor& input, const Tensor& target, const OptimizerState& now, at::TensorList steps) const {
    static const std::optional<Tensor> no_order;
    return args(input, target, now, steps, no_order, std::nullopt);
  }
  TrainArgs args(const Tensor& input, const Tensor& target, const OptimizerState& now, at::TensorList steps,
                 const std::optional<Tensor>& order, std::optional<int64_t> batch_size) const {
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
            recipe_.dropout};
  }

  // A step whose gradients go to gradients_, and the update if it completes a group. Without the GIL.
  Tensor step_by_gradients(const Tensor& x, const Tensor& y, OptimizerState& now) {
    gradients_->begin_step(now);
    const c10::SmallVector<double, 16> scales(now.learning.size(), gradients_->scale());
    TrainArgs sums{x,
                   y,
                   now.parameters,
                   gradients_->views(),
                   {},
                   recipe_.activations,
                   recipe_.activation_parameters,
                   recipe_.loss,
                   recipe_.reduction,
                   recipe_.loss_weight,
                   recipe_.loss_parameters,
                   Accumulate<>::name,
                   now.learning,
                   scales,
                   std::nullopt,
                   std::nullopt,
                   recipe_.dropout};
    const Tensor loss = mlp_train_step_(sums);
    if (gradients_->end_step()) update(now);
    return loss;
  }

  // Averages, clips and applies the gradients of a group. Without the GIL.
  void update(OptimizerState& now) {
    gradients_->end_group();
    if (!average_.is_none()) {
      const py::gil_scoped_acquire gil;
      average_(gradients_->flat());
    }
    gradients_->clip();
    c10::SmallVector<Tensor, 16> learning;
    for (const int64_t index : now.learning) learning.push_back(now.parameters[index]);
    mlp_train_update_({learning, now.states, now.steps, gradients_->views(), optimizer_.name(), now.hyperparameters});
    const py::gil_scoped_acquire gil;
    optimizer_.finish_step(now);
  }

  // A step through the Python function graph(step, key, input, target), which calls step or replays its capture for
  // that key. Not for the first step, which creates states. Needs the GIL.
  Step captured(const py::object& graph, const OptimizerState& now) {
    const auto steps = device_steps_.copies(now);
    const py::object step = py::cpp_function(torch::wrap_pybind_function_no_gil(
        [this, alive = py::cast(this), now, steps](const Tensor& x, const Tensor& y) {
          return mlp_train_step_(args(x, y, now, steps));
        }));
    return [this, graph, step, key = key(now, steps), &now](const Tensor& x, const Tensor& y) {
      device_steps_.copies(now);
      const Tensor loss = graph(step, key, x, y).cast<Tensor>();
      device_steps_.advance(now);
      bump_versions(args(x, y, now, now.steps));  // autograd does not see a replay
      return loss;
    };
  }

  // Everything that a captured step depends on, apart from its arguments.
  py::bytes key(const OptimizerState& now, at::TensorList steps) const {
    std::string key(reinterpret_cast<const char*>(now.hyperparameters.data()),
                    now.hyperparameters.size() * sizeof(double));
    const auto add = [&key](int64_t v) { key.append(reinterpret_cast<const char*>(&v), sizeof(v)); };
    for (const int64_t index : now.learning) add(index);
    add(static_cast<int64_t>(at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL)));
    add(at::globalContext().deterministicAlgorithms());
    for (const at::TensorList tensors : {at::TensorList(now.parameters), at::TensorList(now.states), steps}) {
      add(static_cast<int64_t>(tensors.size()));
      for (const Tensor& t : tensors) add(reinterpret_cast<int64_t>(t.const_data_ptr()));
    }
    return key;
  }

  // Throws if a step cannot take the data now.
  StepData read(const py::object& input, const py::object& target, const OptimizerState& now) const {
    StepData data = data_.read(input, target, now.parameters[0].size(1));
    check_global_state(data.input, data.target, now.parameters);
    return data;
  }

  const Recipe recipe_;
  const StepDataReader data_;
  std::vector<int> hooks_;  // per parameter
  OptimizerReader optimizer_;
  const std::shared_ptr<Gradients> gradients_;
  py::object average_;  // None, or a Python function that averages a tensor over a process group
  py::object guards_object_;
  const Guards* guards_;
  DeviceSteps device_steps_;
};

// One call of fit: makes the batches of each epoch and runs them.
class TrainingRun {
 public:
  TrainingRun(Trainer& trainer, const StepData& data, OptimizerState now, const Epochs& epochs, const py::object& graph)
      : trainer_(trainer),
        input_(data.input),
        target_(data.target),
        epochs_(epochs),
        graph_(graph),
        rows_(data.input.size(0)),
        rows_of_one_(data.rows_of_one),
        batch_size_(std::max<int64_t>(1, std::min(epochs.batch_size, rows_) * rows_of_one_)),  // must not overflow
        now_(std::move(now)) {}

  // Call without the GIL.
  std::vector<double> run() {
    std::vector<double> losses;
    const int64_t at_a_time = epochs_per_order();
    for (int64_t epoch = 0; epoch < epochs_.count;) {
      const int64_t count = std::min(at_a_time, epochs_.count - epoch);
      const Tensor found = (train_batches(order(count), count)).to(at::kCPU, at::kDouble);
      const int64_t batches = found.size(0) / count;
      for (int64_t i = 0; i < count; ++i, ++epoch) {
        losses.push_back(of_epoch(found.const_data_ptr<double>() + i * batches, batches));
        if (epochs_.after_epoch.is_none()) continue;
        const py::gil_scoped_acquire gil;
        epochs_.after_epoch(epoch, losses.back());
      }
    }
    if (trainer_.gradients_->is_pending()) trainer_.update(now_);
    return losses;
  }

 private:
  // ---- batches ----

  // Number of epochs per synchronisation with the device.
  int64_t epochs_per_order() const {
    const bool one_batch = !epochs_.shuffle && rows_ > 0 && batch_size_ >= rows_;
    if (!one_batch || !epochs_.after_epoch.is_none()) return 1;
    if (!gathers_repeated()) return kStepsPerCall;
    return std::clamp<int64_t>(kRepeatedRows / rows_, 1, kStepsPerCall);
  }

  bool is_one_step_per_call() const { return !graph_.is_none() || trainer_.by_gradients(); }

  bool gathers_repeated() const {
    const auto bytes = static_cast<int64_t>(input_.nbytes());
    return !is_one_step_per_call() &&
           (input_.is_cpu() ? bytes <= kRepeatedBytesOnCpu : epochs_.at_once && bytes <= kRepeatedBytes);
  }

  // Row indices of the next epochs, batch after batch; none: rows in their own order. An eager loop with
  // the same generator draws the same permutation.
  std::optional<Tensor> order(int64_t count) const {
    if (epochs_.shuffle) {
      const int64_t T = rows_of_one_;
      const Tensor drawn = at::randperm(T > 0 ? rows_ / T : 0, epochs_.generator, at::dtype(at::kLong).device(at::kCPU))
                               .to(input_.device());
      return T == 1 ? drawn : (drawn.unsqueeze(1) * T + at::arange(T, drawn.options())).flatten();
    }
    if (count > 1 && gathers_repeated()) return at::arange(rows_, input_.options().dtype(at::kLong)).repeat({count});
    return std::nullopt;
  }

  // The loss of an epoch from those of its batches: the mean over its rows (NaN if there are none), or the sum.
  double of_epoch(const double* losses, int64_t batches) const {
    const bool mean = trainer_.recipe_.reduction == "mean";
    double total = 0;
    for (int64_t i = 0; i < batches; ++i)
      total += losses[i] * (mean ? std::min(batch_size_, rows_ - i * batch_size_) : 1);
    return mean ? total / rows_ : total;
  }

  // ---- steps ----

  // Trains on all batches of the order once, or without one on all rows `count` times; returns the losses.
  Tensor train_batches(const std::optional<Tensor>& order, int64_t count) {
    std::vector<Tensor> losses;
    for (int64_t i = 0; i < (order ? 1 : count); ++i) {
      if (is_one_step_per_call())
        by_steps(order, losses);
      else
        by_operator(order, losses);
    }
    if (losses.size() == 1) return losses[0];
    return losses.empty() ? at::empty({0}, input_.options()) : at::cat(losses);
  }

  // Many steps per call, but few enough to check for signals often.
  void by_operator(const std::optional<Tensor>& order, std::vector<Tensor>& losses) {
    const int64_t rows = order ? order->size(0) : rows_;
    for (int64_t begin = 0, size = 0; begin < rows; begin += size) {
      size = std::min(rows - begin, steps_per_call_ * batch_size_);
      const auto part = [&](const Tensor& t) { return size == rows ? t : t.narrow(0, begin, size); };
      const std::optional<Tensor> its_order = order ? std::optional<Tensor>(part(*order)) : std::nullopt;
      const Tensor x = order ? input_ : part(input_), y = order ? target_ : part(target_);
      const auto before = Clock::now();
      losses.push_back(mlp_train_step_(trainer_.args(x, y, now_, now_.steps, its_order, batch_size_)));
      const auto took = Clock::now() - before;
      if (took < kBetweenSignals / 8) steps_per_call_ = std::min(4 * steps_per_call_, kStepsPerCall);
      if (took > kBetweenSignals / 2) steps_per_call_ = std::max<int64_t>(steps_per_call_ / 2, 1);
      after_steps();
    }
  }

  // One step per call: a graph holds one, and gradients may be needed after each.
  void by_steps(const std::optional<Tensor>& order, std::vector<Tensor>& losses) {
    const int64_t row_bytes = std::max<int64_t>(1, input_.size(1) * input_.element_size());
    const int64_t chunk = order ? std::max<int64_t>(1, kShuffledBytes / row_bytes / batch_size_) * batch_size_ : rows_;
    for (int64_t begin = 0; begin < rows_; begin += chunk) {
      const int64_t size = std::min(chunk, rows_ - begin);
      const auto part = [&](const Tensor& t) {
        return order ? at::index_select(t, 0, order->narrow(0, begin, size)) : t;
      };
      const Tensor x = part(input_), y = part(target_);
      for (int64_t i = 0; i < size; i += batch_size_) {
        const int64_t batch = std::min(batch_size_, size - i);
        losses.push_back(step(x.narrow(0, i, batch), y.narrow(0, i, batch)).unsqueeze(0));
        after_steps();
      }
    }
  }

  Tensor step(const Tensor& x, const Tensor& y) {
    if (trainer_.by_gradients()) return trainer_.step_by_gradients(x, y, now_);
    if (now_.is_first_step()) return mlp_train_step_(trainer_.args(x, y, now_, now_.steps));
    const py::gil_scoped_acquire gil;
    if (!replay_) replay_ = trainer_.captured(graph_, now_);
    return replay_(x, y);
  }

  void after_steps() {
    if (std::exchange(is_first_, false) && !trainer_.by_gradients()) {
      const py::gil_scoped_acquire gil;
      trainer_.optimizer_.finish_step(now_);
    }
    if (const auto now = Clock::now(); now - last_ > kBetweenSignals) {
      last_ = now;
      const py::gil_scoped_acquire gil;
      if (PyErr_CheckSignals()) throw py::error_already_set();
    }
  }

  Trainer& trainer_;
  const Tensor &input_, &target_;
  const Epochs& epochs_;
  const py::object& graph_;  // see Trainer::captured, or None
  const int64_t rows_, rows_of_one_, batch_size_;
  OptimizerState now_;
  Step replay_;
  int64_t steps_per_call_ = 1;  // the first step is alone: it creates states and has its own hyperparameters
  bool is_first_ = true;
  Clock::time_point last_ = Clock::now();
};

std::optional<std::vector<double>> Trainer::fit(const py::object& input, const py::object& target, int64_t epochs,
                                                int64_t batch_size, bool shuffle,
                                                const std::optional<at::Generator>& generator,
                                                const py::object& after_epoch, const py::object& graph, bool at_once) {
  if (!is_current()) return std::nullopt;
  OptimizerState now = optimizer_.read();
  const StepData data = read(input, target, now);
  TORCH_CHECK_VALUE(batch_size >= 1, "TrainStep: batch_size must be from 1 on, got ", batch_size);
  const Epochs options{epochs, batch_size, shuffle, generator, after_epoch, at_once};
  TrainingRun run(*this, data, std::move(now), options, graph);  // holds Python objects: must be destroyed with the GIL
  const py::gil_scoped_release no_gil;
  return run.run();
}

}  // namespace

void bind_trainer(py::module_& m) {
  py::class_<Gradients, std::shared_ptr<Gradients>>(m, "Gradients", "Gradients of a TrainStep before their update.")
      .def(py::init<std::optional<double>, int64_t>(), py::arg("max_norm"), py::arg("accumulate"));

  const auto make = [](const py::sequence& parameters, std::vector<int64_t> groups,
                       const std::vector<std::string>& activations, std::vector<double> activation_parameters,
                       std::vector<double> dropout, std::vector<std::pair<int64_t, int64_t>> flattened,
                       std::string loss, std::string reduction, std::optional<Tensor> loss_weight,
                       std::vector<double> loss_parameters, bool promotes, const py::object& optimizer,
                       std::string optimizer_name, const std::map<std::string, double>& optimizer_defaults,
                       py::object guards, std::shared_ptr<Gradients> gradients, py::object average) {
    StepDataReader data(loss, promotes, std::move(flattened));
    Recipe recipe{Names(activations),     std::move(activation_parameters), std::move(loss),   std::move(reduction),
                  std::move(loss_weight), std::move(loss_parameters),       std::move(dropout)};
    return std::make_unique<Trainer>(parameters, std::move(groups), std::move(recipe), std::move(data), optimizer,
                                     std::move(optimizer_name), optimizer_defaults, std::move(guards),
                                     std::move(gradients), std::move(average));
  };
  py::class_<Trainer>(m, "Trainer", "Implementation of mlp_ext.TrainStep.", collectable<Trainer>())
      .def(py::init(make), py::arg("parameters"), py::arg("groups"), py::arg("activations"),
           py::arg("activation_parameters"), py::arg("dropout"), py::arg("flattened"), py::arg("loss"),
           py::arg("reduction"), py::arg("loss_weight"), py::arg("loss_parameters"), py::arg("promotes"),
           py::arg("optimizer"), py::arg("optimizer_name"), py::arg("optimizer_defaults"), py::arg("guards"),
           py::arg("gradients"), py::arg("average"))
      .def("is_current", &Trainer::is_current)
      .def("by_gradients", &Trainer::by_gradients)
      .def("step", torch::wrap_pybind_function(&Trainer::step), py::arg("input"), py::arg("target"),
           py::arg("graph") = py::none())
      .def("fit", torch::wrap_pybind_function(&Trainer::fit), py::arg("input"), py::arg("target"), py::arg("epochs"),
           py::arg("batch_size"), py::arg("shuffle"), py::arg("generator"), py::arg("after_epoch"),
           py::arg("graph") = py::none(), py::arg("at_once") = false);
}

}  // namespace mlp_ext
