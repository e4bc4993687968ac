// The optimizer's updates of parameters by the kernels.
#pragma once

#include <ATen/TensorOperators.h>

#include <cstring>
#include <vector>

#include "cpu/caching_allocator.h"
#include "cpu/layer.h"
#include "cpu/variants.h"
#include "ops/checks.h"
#include "ops/train.h"

namespace mlp_ext::cpu {

// The steps done, of a count on the CPU: item() takes as long as a small network's step.
inline double steps_done(const at::Tensor& count) {
  return count.scalar_type() == at::kFloat ? *count.const_data_ptr<float>() : *count.const_data_ptr<double>();
}

// The updates of all parameters that learn, prepared for each step by begin_step().
class Updates {
 public:
  explicit Updates(const Training& training) {
    updates_.reserve(2 * training.layers.size());
    for (const TrainedLayer& layer : training.layers)
      for (const TrainedParameter* p : {&layer.weight, &layer.bias}) {
        Learning l{p->optimizer ? p : nullptr, {}, {}, 0};
        if (l.parameter) {
          l.update.parameter = p->value->mutable_data_ptr();
          for (size_t s = 0; s < kMaxStates; ++s)
            l.update.states[s] = p->states[s] ? p->states[s]->mutable_data_ptr() : nullptr;
          if (p->step) l.steps = steps_done(*p->step);
        }
        updates_.push_back(l);
      }
    for (Learning& l : updates_) l.update.optimizer = &l.ready;
  }

  void begin_step() {
    const Learning* last = nullptr;
    for (Learning& l : updates_) {
      if (!l.parameter) continue;
      const bool same =
          last && last->steps == l.steps && last->parameter->optimizer->index == l.parameter->optimizer->index &&
          std::memcmp(last->parameter->optimizer->bytes, l.parameter->optimizer->bytes, sizeof(l.ready.bytes)) == 0;
      l.ready = same ? last->ready : at_step(*l.parameter->optimizer, l.steps + 1);  // pow() is slow: share the result
      last = &l;
    }
  }
  // After the step succeeded.
  void end_step() {
    for (Learning& l : updates_) {
      if (!l.parameter || !l.parameter->step) continue;
      l.steps += 1;
      const at::Tensor& step = *l.parameter->step;
      if (step.scalar_type() == at::kFloat)  // add_ takes as long as a small network's step
        *step.mutable_data_ptr<float>() += 1;
      else
        step.add_(1);
    }
  }

  // Update of a layer's weight or bias; nullptr if it does not learn.
  const Update* of(size_t layer, bool bias) const {
    const Learning& l = updates_[2 * layer + (bias ? 1 : 0)];
    return l.parameter ? &l.update : nullptr;
  }

 private:
  struct Learning {
    const TrainedParameter* parameter;  // or nullptr
    Update update;
    Optimizer ready;
    double steps;  // done so far
  };
  std::vector<Learning> updates_;
};

// As t.to(dtype), in cached memory.
inline at::Tensor cast(const at::Tensor& t, at::ScalarType dtype) {
  return t.scalar_type() == dtype ? t : empty_cached(t.sizes(), dtype).copy_(t);
}

// The update of a parameter by the kernels.
inline void update(const TrainedParameter& p, const at::Tensor& gradient) {
  bool as_kernels_need = p.value->is_contiguous() && (!p.step || p.step->is_cpu());
  for (const at::Tensor* state : p.states) as_kernels_need = as_kernels_need && (!state || state->is_contiguous());
  if (!as_kernels_need) return update_native(p, gradient);
  const StepKernels& kernels = variant().step_kernels(dtype_of(*p.value));
  const Optimizer ready = at_step(*p.optimizer, p.step ? steps_done(*p.step) + 1 : 1);
  Update update{p.value->mutable_data_ptr(), {}, &ready};
  for (size_t s = 0; s < kMaxStates; ++s) update.states[s] = p.states[s] ? p.states[s]->mutable_data_ptr() : nullptr;
  const at::Tensor dense = cast(gradient, p.value->scalar_type()).contiguous();
  const void* const part = dense.const_data_ptr();
  const auto piece = [&](int64_t begin, int64_t end) { kernels.update_rounded(update, part, 1, 0, {begin, end}); };
  for_ranges(dense.numel(), limits_of(dtype_of(*p.value)).elements_per_thread, piece);
}

}  // namespace mlp_ext::cpu
