// Reads the settings and states of a torch.optim optimizer for a step.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <map>
#include <optional>
#include <string>
#include <vector>

namespace mlp_ext {

// The optimizer's current settings and states, as arguments of mlp_train_step_.
struct OptimizerState {
  struct Created {  // a new state
    size_t parameter;
    pybind11::object name;
    at::Tensor tensor;
    pybind11::object entry = {};   // the dict in optimizer.state that it is stored in
    pybind11::object before = {};  // what that had of this name, or null
    bool is_new_entry = false;
  };
  struct Later {  // a hyperparameter that takes effect in the second step
    size_t index;
    double value;
  };
  c10::SmallVector<at::Tensor, 16> parameters;  // of the model
  c10::SmallVector<int64_t, 16> learning;
  c10::SmallVector<double, 128> hyperparameters;
  c10::SmallVector<at::Tensor, 32> states;
  c10::SmallVector<at::Tensor, 16> steps;
  std::vector<Created> created;
  std::vector<Later> later;

  bool is_first_step() const { return !created.empty(); }
  void finish_first_step() {  // needs the GIL
    created.clear();
    for (const auto& [index, value] : later) hyperparameters[index] = value;
    later.clear();
  }
  // Of the parameters that learn.
  std::vector<const void*> identities() const {
    std::vector<const void*> found;
    for (const int64_t index : learning) found.push_back(parameters[index].unsafeGetTensorImpl());
    return found;
  }
};

class OptimizerReader {
 public:
  // name: in optimizers.h. defaults: values for settings that this torch version's optimizer lacks, if they differ from
  // the functor's defaults. groups: index of each parameter's group, or -1 if the optimizer does not have it.
  OptimizerReader(const pybind11::object& optimizer, std::string name, const std::map<std::string, double>& defaults,
                  const pybind11::sequence& parameters, std::vector<int64_t> groups);

  const std::string& name() const { return name_; }
  size_t size() const { return parameters_.size(); }
  const at::Tensor& parameter(size_t i) const { return THPVariable_Unpack(parameters_[i].ptr()); }
  OptimizerState read() const;
  // Runs step() and with it whatever else a step does to the optimizer. If it throws, and has changed nothing, neither
  // has this. Needs the GIL; step may release it.
  template <class F>
  void run_step(OptimizerState& now, const F& step) const {
    try {
      begin_step(now.created);
      step();
    } catch (...) {
      take_back(now.created);
      throw;
    }
    now.finish_first_step();
  }
  // Before a step: stores the created states in the optimizer, and marks it as stepped for schedulers. This runs
  // Python, and with it handlers of signals, which may throw; so nothing of it may come after the update of parameters.
  void begin_step(std::vector<OptimizerState::Created>& created) const;
  // After an error: takes them out of the optimizer again, unless a step has changed one.
  void take_back(std::vector<OptimizerState::Created>& created) const;

  // For Python's garbage collector.
  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  struct Setting {
    pybind11::object key;
    int64_t element;              // index into the tuple at that key, or -1
    std::optional<double> value;  // used if the key is missing
  };

  template <class Functor>
  void read_as(OptimizerState& now) const;
  template <class Functor>
  void read_states(size_t i, const Functor& optimizer, pybind11::handle group, pybind11::handle states,
                   OptimizerState& now) const;
  void read_group(pybind11::handle group, double* numbers) const;
  void store(OptimizerState::Created& created, pybind11::handle states) const;

  // Keys of optimizer.state. No at::Tensor is kept between steps: torch.utils.swap_tensors needs the only reference.
  std::vector<pybind11::object> parameters_;
  const std::vector<int64_t> groups_;
  const std::string name_;
  const size_t index_;
  pybind11::object optimizer_;  // the dict of the optimizer's attributes
  std::vector<Setting> settings_;
  std::vector<pybind11::object> state_names_;
};

}  // namespace mlp_ext
