#include "python/trainers.h"

#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <numeric>

#include "python/guards.h"
#include "python/many_epochs.h"

namespace py = pybind11;

namespace mlp_ext {

using at::Tensor;

Trainers::Trainers(const py::sequence& trainers) {
  for (const py::handle trainer : trainers) {
    objects_.push_back(py::reinterpret_borrow<py::object>(trainer));
    trainers_.push_back(trainer.cast<const Trainer*>());
  }
  TORCH_CHECK_VALUE(!trainers_.empty(), "TrainSteps: models must be at least one");
}

std::vector<size_t> Trainers::stale() const {
  std::vector<size_t> found;
  for (size_t i = 0; i < trainers_.size(); ++i)
    if (!trainers_[i]->is_current()) found.push_back(i);
  return found;
}

bool Trainers::is_current() const {
  return std::all_of(trainers_.begin(), trainers_.end(), [](const Trainer* trainer) { return trainer->is_current(); });
}

namespace {

void check_state(const StepData& data, const Networks& networks, const Recipe& recipe) {
  check_global_state(data.input, data.target, networks.parameters());
  check_loss_weight(recipe);
  TORCH_CHECK(!autocast_dtype(data.input),
              "TrainSteps: autocast is enabled, and steps of many networks do not follow it; leave it, or use a "
              "TrainStep for each");
}

}  // namespace

std::optional<Tensor> Trainers::step(const py::object& input, const py::object& target) const {
  if (!is_current()) return std::nullopt;
  const OneCall call = trainers_[0]->one_call("TrainSteps");
  const StepData data = read(input, target);
  const int64_t rows = data.input.dim() < 2 ? 1 : data.input.size(-2);
  std::vector<size_t> all(trainers_.size());
  std::iota(all.begin(), all.end(), 0);
  Networks networks(trainers_, all);
  check_state(data, networks, trainers_[0]->recipe());
  const py::gil_scoped_release no_gil;
  const Tensor losses =
      rows == 0 ? networks.step_without_rows(data) : networks.train(data, {0, all.size(), {}, 1, rows}).squeeze(1);
  networks.rethrow();
  return data.promoted ? losses.to(at::kDouble) : losses;
}

std::optional<Tensor> Trainers::fit(const py::object& input, const py::object& target, int64_t epochs,
                                    int64_t batch_size, bool shuffle, const std::vector<at::Generator>& generators,
                                    const std::vector<Tensor>& rows, const py::object& after_epoch) const {
  if (!is_current()) return std::nullopt;
  const OneCall call = trainers_[0]->one_call("TrainSteps");
  const auto fits = [&](const auto& list) { return list.empty() || list.size() == trainers_.size(); };
  TORCH_CHECK_VALUE(batch_size >= 1 && fits(generators) && fits(rows), "TrainSteps: an argument of fit does not fit");
  const StepData data = read(input, target);
  TORCH_CHECK(data.input.dim() >= 2, "mlp_train_many_: input must have rows");
  const ManyEpochs options{epochs, batch_size, shuffle, generators, rows, after_epoch};
  std::vector<size_t> order(trainers_.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&, M = data.input.size(-2)](size_t a, size_t b) {
    return batch_size_of(options, a, M) < batch_size_of(options, b, M);
  });
  Networks networks(trainers_, order);
  check_state(data, networks, trainers_[0]->recipe());
  ManyEpochsRun run(networks, data, options, trainers_[0]->recipe());
  const py::gil_scoped_release no_gil;
  return run.run();
}

// Throws if no step can take the data.
StepData Trainers::read(const py::object& input, const py::object& target) const {
  return trainers_[0]->data().read_for_many(input, target, trainers_[0]->optimizer().parameter(0).size(1));
}

int Trainers::traverse(visitproc visit, void* arg) const {
  for (const py::object& object : objects_) Py_VISIT(object.ptr());
  return 0;
}

void Trainers::clear() {
  trainers_.clear();
  objects_.clear();
}

void bind_trainers(py::module_& m) {
  py::class_<Trainers>(m, "Trainers", "Implementation of mlp_ext.TrainSteps.", collectable<Trainers>())
      .def(py::init<const py::sequence&>(), py::arg("trainers"))
      .def("stale", &Trainers::stale)
      .def("step", torch::wrap_pybind_function(&Trainers::step), py::arg("input"), py::arg("target"))
      .def("fit", torch::wrap_pybind_function(&Trainers::fit), py::arg("input"), py::arg("target"), py::arg("epochs"),
           py::arg("batch_size"), py::arg("shuffle"), py::arg("generators"), py::arg("rows"), py::arg("after_epoch"));
}

}  // namespace mlp_ext
