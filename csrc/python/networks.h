// Many networks as mlp_train_many_ takes them: the settings and states of their optimizers, one after another.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <exception>
#include <limits>
#include <vector>

#include "python/optimizer_state.h"
#include "python/step_data.h"
#include "python/trainer.h"

namespace mlp_ext {

class Networks {
 public:
  // trainers: of all networks; order: indices of them, each once. Throws if they cannot train together.
  Networks(const std::vector<const Trainer*>& trainers, const std::vector<size_t>& order);

  size_t size() const { return members_.size(); }
  size_t index(size_t i) const { return members_[i].index; }  // among the trainers
  at::TensorList parameters() const { return parameters_; }
  // A network that fails, as where its outputs are no probabilities, stops there; the others go on.
  bool has_failed(size_t i) const { return members_[i].has_failed; }
  // Whether one of these is before a first step that has hyperparameters of its own.
  bool has_own_first_step(size_t begin, size_t end) const;

  // What the networks from begin to end do in one call of the operator.
  struct Work {
    size_t begin, end;
    at::TensorList orders;
    int64_t epochs, batch_size;
  };
  // Trains them and returns the losses [end - begin, epochs * batches]. None of them may have failed. Call without the
  // GIL.
  at::Tensor train(const StepData& data, const Work& work);
  // Throws what the operator would, apart from errors of values. Nothing changes.
  void check(const StepData& data) const;
  // A step of all rows, of which there are none. Returns the losses [networks]. Call without the GIL.
  at::Tensor step_without_rows(const StepData& data);
  // Throws the error of the first network that failed, if any.
  void rethrow() const;

 private:
  struct Member {
    const Trainer* trainer;
    size_t index;
    size_t states, steps;  // where its own begin
    std::vector<OptimizerState::Created> created;
    bool has_stepped = false, has_failed = false;
  };
  struct Later {
    size_t member, hyperparameter;  // index in hyperparameters_
    double value;
  };

  // Runs step() of the networks from begin to end, and what it does to their optimizers: see OptimizerReader::run_step.
  template <class F>
  void run_step(size_t begin, size_t end, const F& step);
  at::Tensor call(const StepData& data, const Work& work) const;
  at::Tensor of_range(const at::Tensor& t, int64_t dim, size_t begin, size_t end) const;
  at::TensorList range(at::TensorList all, size_t Member::* start, size_t begin, size_t end) const;
  template <class List>
  auto equal_parts(const List& list, size_t begin, size_t end) const;

  std::vector<Member> members_;
  std::vector<at::Tensor> parameters_, states_, steps_;
  std::vector<double> hyperparameters_;
  std::vector<Later> later_;
  c10::SmallVector<int64_t, 16> learning_;  // the same for all
  size_t first_failed_ = std::numeric_limits<size_t>::max();
  std::exception_ptr error_;
};

}  // namespace mlp_ext
