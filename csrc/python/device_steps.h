// Counts of steps for captured steps.
#pragma once

#include <ATen/ops/empty.h>

#include <cmath>

#include "python/optimizer_state.h"

namespace mlp_ext {

// Copies of the optimizer's counts of steps beside the parameters: a captured step reads and advances them there.
class DeviceSteps {
 public:
  // Those of the parameters that learn, as the optimizer's are now. Until advance() they may differ from these.
  c10::SmallVector<at::Tensor, 16> copies(const OptimizerState& now, const std::vector<at::Tensor>& parameters) {
    copies_.resize(parameters.size());
    c10::SmallVector<at::Tensor, 16> found;
    for (size_t k = 0; k < now.steps.size(); ++k) {
      const at::Tensor &step = now.steps[k], &parameter = parameters[now.learning[k]];
      if (!step.is_cpu()) {  // as fused has it
        found.push_back(step);
        continue;
      }
      Copy& copy = copies_[now.learning[k]];
      if (!copy.tensor.defined() || copy.tensor.device() != parameter.device())
        copy = {at::empty({}, parameter.options().dtype(at::kFloat)), NAN};
      const double count = step.item<double>();
      if (copy.count != count) copy.tensor.fill_(count);
      copy.count = NAN;
      found.push_back(copy.tensor);
    }
    return found;
  }

  // After a step on the copies: the optimizer's own.
  void advance(const OptimizerState& now) {
    for (size_t k = 0; k < now.steps.size(); ++k) {
      const at::Tensor& step = now.steps[k];
      if (!step.is_cpu()) continue;
      if (step.scalar_type() == at::kFloat)
        *step.mutable_data_ptr<float>() += 1;  // add_ takes a microsecond
      else
        step.add_(1);
      copies_[now.learning[k]].count = step.item<double>();
    }
  }

 private:
  struct Copy {
    at::Tensor tensor;
    double count = NAN;  // that it has; NaN: unknown
  };
  std::vector<Copy> copies_;  // of each parameter
};

}  // namespace mlp_ext
