// Epochs of many networks: the rows of their batches, and how many networks, epochs and batches one call trains.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

#include "python/networks.h"
#include "python/signals.h"
#include "python/step_data.h"

namespace mlp_ext {

// Options of TrainSteps.fit.
struct ManyEpochs {
  int64_t count, batch_size;
  bool shuffle;
  const std::vector<at::Generator>& generators;  // one for each network, or none: torch's default one for all
  const std::vector<at::Tensor>& rows;           // of each network, int64 on the CPU, or none: all rows
  const pybind11::object& after_epoch;           // None, or called with the epoch and the lowest loss
};

// The batch size of a network, at most its number of rows; networks must be sorted by it.
int64_t batch_size_of(const ManyEpochs& epochs, size_t index, int64_t input_rows);

// One call of fit.
class ManyEpochsRun {
 public:
  ManyEpochsRun(Networks& networks, const StepData& data, const ManyEpochs& epochs, const Recipe& recipe);
  // Returns the loss of each epoch, [epochs, networks] of float64 on the CPU. Call without the GIL.
  at::Tensor run();

 private:
  // Networks of the same batch size: their kernels are chosen by it, so it must not depend on other networks.
  struct Group {
    size_t begin, end;
    int64_t batch_size, batches;  // batches: of the longest epoch
  };
  // A range of networks of a group, and the epochs that they train before others do.
  struct Slab {
    const Group& group;
    size_t begin, end;
    int64_t epoch, epochs;
    std::vector<at::Tensor> orders;  // as of mlp_train_many_

    int64_t size() const { return static_cast<int64_t>(end - begin); }
  };

  int64_t rows_of(size_t i) const;
  bool has_own_orders() const { return !epochs_.rows.empty() || (epochs_.shuffle && !epochs_.generators.empty()); }
  int64_t epochs_at_a_time(int64_t left) const;
  size_t slab_size(const Group& group, int64_t epochs) const;
  void draw_shared(int64_t epochs);
  const at::Tensor& shared_order(int64_t rows) const;
  at::Tensor own_order(size_t i, int64_t epochs) const;
  std::vector<at::Tensor> orders(size_t begin, size_t end, int64_t epochs) const;

  void train(Slab slab);
  void train_batches(const Slab& slab, int64_t first, int64_t count);
  void add_losses(const at::Tensor& losses, size_t begin, size_t end, const Slab& slab, int64_t first);
  void finish_epochs(int64_t epoch, int64_t epochs);
  void adapt(int64_t steps, Signals::Clock::duration took);

  Networks& networks_;
  const StepData& data_;
  const ManyEpochs& epochs_;
  const bool mean_, one_batch_per_call_;
  const int64_t input_rows_;
  const size_t slab_unit_;
  std::vector<Group> groups_;
  std::vector<std::pair<int64_t, at::Tensor>> shared_;  // number of rows, and their permutations [epochs, rows]
  int64_t longest_ = 0, steps_of_epoch_ = 0;            // rows of a network at most; steps of all networks
  double steps_per_call_;
  std::vector<double> losses_;  // [epochs, networks], grows as they are trained
  Signals signals_;
};

}  // namespace mlp_ext
