// The class mlp_ext._C.Trainers, implementation of TrainSteps: a Trainer for each of many networks, trained together by
// mlp_train_many_.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <vector>

#include "python/networks.h"
#include "python/trainer.h"

namespace mlp_ext {

class Trainers {
 public:
  // trainers: a Trainer for each network. Their models are alike, their criterion is the same.
  explicit Trainers(const pybind11::sequence& trainers);

  // Networks whose model, criterion or optimizer was modified since they were read.
  std::vector<size_t> stale() const;
  // Runs a step of each network and returns the losses [networks]; does nothing and returns none if one is stale.
  std::optional<at::Tensor> step(const pybind11::object& input, const pybind11::object& target) const;
  // Returns the loss of each epoch, [epochs, networks] of float64 on the CPU; does nothing and returns none if one is
  // stale. generators: one for each network, or none: torch's default one for all. rows: indices of each network's rows
  // on the CPU, or none: all rows. after_epoch: None, or called with the epoch and the lowest loss.
  std::optional<at::Tensor> fit(const pybind11::object& input, const pybind11::object& target, int64_t epochs,
                                int64_t batch_size, bool shuffle, const std::vector<at::Generator>& generators,
                                const std::vector<at::Tensor>& rows, const pybind11::object& after_epoch) const;

  // For Python's garbage collector.
  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  bool is_current() const;
  StepData read(const pybind11::object& input, const pybind11::object& target) const;

  std::vector<pybind11::object> objects_;
  std::vector<const Trainer*> trainers_;
};

void bind_trainers(pybind11::module_& m);

}  // namespace mlp_ext
