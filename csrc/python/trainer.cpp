#include "python/trainer.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/randperm.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <utility>

#include "python/signals.h"

namespace py = pybind11;

namespace mlp_ext {
namespace {

using at::Tensor;
using Clock = Signals::Clock;

constexpr int64_t kStepsPerCall = 4096;
// The first call of fit, before the time of a step is known: at most so many steps, and multiply-adds of their forward
// passes. It should take less than about 10 ms.
constexpr int64_t kFirstSteps = 64, kFirstMultiplyAdds = int64_t(1) << 22;
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

}  // namespace

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
        now_(std::move(now)),
        steps_per_call_(first_steps()) {}

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

  // Steps in the first call; one if it creates states, since then it has hyperparameters of its own.
  int64_t first_steps() const {
    if (now_.is_first_step()) return 1;
    int64_t of_a_row = 0;
    for (const Tensor& p : now_.parameters) of_a_row += p.numel();
    return std::clamp<int64_t>(kFirstMultiplyAdds / (batch_size_ * std::max<int64_t>(of_a_row, 16)), 1, kFirstSteps);
  }

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
      losses.push_back(call(trainer_.args(x, y, now_, now_.steps, its_order, batch_size_)));
      const auto took = Clock::now() - before;
      if (took < Signals::kInterval / 8) steps_per_call_ = std::min(4 * steps_per_call_, kStepsPerCall);
      if (took > Signals::kInterval / 2) steps_per_call_ = std::max<int64_t>(steps_per_call_ / 2, 1);
      signals_.check();
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
        signals_.check();
      }
    }
  }

  Tensor step(const Tensor& x, const Tensor& y) {
    if (trainer_.by_gradients()) return trainer_.step_by_gradients(x, y, now_);
    if (now_.is_first_step()) return call(trainer_.args(x, y, now_, now_.steps));
    const py::gil_scoped_acquire gil;
    if (!replay_) {
      trainer_.optimizer_.begin_step(now_.created);
      replay_ = trainer_.captured(graph_, now_);
    }
    return replay_(x, y);
  }

  // The first call, which is of one step, has effects on the optimizer.
  Tensor call(const TrainArgs& args) {
    if (!std::exchange(is_first_, false)) return mlp_train_step_(args);
    const py::gil_scoped_acquire gil;
    return trainer_.run_step(now_, args);
  }

  Trainer& trainer_;
  const Tensor &input_, &target_;
  const Epochs& epochs_;
  const py::object& graph_;  // see Trainer::captured, or None
  const int64_t rows_, rows_of_one_, batch_size_;
  OptimizerState now_;
  Step replay_;
  int64_t steps_per_call_;
  bool is_first_ = true;
  Signals signals_;
};

std::optional<std::vector<double>> Trainer::fit(const py::object& input, const py::object& target, int64_t epochs,
                                                int64_t batch_size, bool shuffle,
                                                const std::optional<at::Generator>& generator,
                                                const py::object& after_epoch, const py::object& graph, bool at_once) {
  if (!is_current()) return std::nullopt;
  const OneCall call = one_call("TrainStep");
  OptimizerState now = optimizer_.read();
  const StepData data = read(input, target, now);
  TORCH_CHECK_VALUE(batch_size >= 1, "TrainStep: batch_size must be from 1 on, got ", batch_size);
  const Epochs options{epochs, batch_size, shuffle, generator, after_epoch, at_once};
  TrainingRun run(*this, data, std::move(now), options, graph);  // holds Python objects: must be destroyed with the GIL
  const py::gil_scoped_release no_gil;
  return run.run();
}

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
      .def("check_optimizer", torch::wrap_pybind_function([](const Trainer& trainer) { trainer.optimizer().read(); }))
      .def("step", torch::wrap_pybind_function(&Trainer::step), py::arg("input"), py::arg("target"),
           py::arg("graph") = py::none())
      .def("fit", torch::wrap_pybind_function(&Trainer::fit), py::arg("input"), py::arg("target"), py::arg("epochs"),
           py::arg("batch_size"), py::arg("shuffle"), py::arg("generator"), py::arg("after_epoch"),
           py::arg("graph") = py::none(), py::arg("at_once") = false);
}

}  // namespace mlp_ext
