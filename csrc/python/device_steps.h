// Step counts on the device, for captured steps.
#pragma once

#include <ATen/ops/empty.h>

#include <cmath>

#include "ops/train.h"
#include "python/optimizer_state.h"

namespace mlp_ext {

// Copies of the optimizer's step counts on the parameters' devices, which captured steps read and advance.
class DeviceSteps {
 public:
  // The copies for learning parameters, synchronised with the optimizer. A step makes them differ until advance().
  c10::SmallVector<at::Tensor, 16> copies(const OptimizerState& now) {
    copies_.resize(now.parameters.size());
    c10::SmallVector<at::Tensor, 16> found;
    for (size_t k = 0; k < now.steps.size(); ++k) {
      const at::Tensor &step = now.steps[k], &parameter = now.parameters[now.learning[k]];
      if (!step.is_cpu()) {  // fused=True keeps it on the device
        found.push_back(step);
        continue;
      }
      Copy& copy = copies_[now.learning[k]];
      if (!copy.tensor.defined() || copy.tensor.device() != parameter.device())
        copy = {at::empty({}, parameter.options().dtype(at::kFloat)), NAN};
      const double count = count_of(step);
      if (copy.count != count) copy.tensor.fill_(count);
      copy.count = NAN;
      found.push_back(copy.tensor);
    }
    return found;
  }

  // Advances the optimizer's step counts, after a step on the copies.
  void advance(const OptimizerState& now) {
    for (size_t k = 0; k < now.steps.size(); ++k) {
      const at::Tensor& step = now.steps[k];
      if (!step.is_cpu()) continue;
      mlp_ext::advance(step);
      copies_[now.learning[k]].count = count_of(step);
    }
  }

  // The same after an error, if the step was done before it, as the copies tell. Waits for the device.
  void advance_if_done(const OptimizerState& now) {
    for (size_t k = 0; k < now.steps.size(); ++k) {
      const at::Tensor& step = now.steps[k];
      if (step.is_cpu() && copies_[now.learning[k]].tensor.item<double>() > count_of(step)) mlp_ext::advance(step);
    }
  }

 private:
  struct Copy {
    at::Tensor tensor;
    double count = NAN;  // value of tensor; NaN: unknown
  };
  std::vector<Copy> copies_;  // per parameter
};

}  // namespace mlp_ext
