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
          p->put_states(l.update.states);
          if (p->step) l.steps = count_of(*p->step);
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
      advance(*l.parameter->step);
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

// Updates `size` elements with a gradient [size] of the parameter's dtype. Allocates nothing.
inline void update_with(const Update& update, const void* gradient, int64_t size, DType dtype) {
  const StepKernels& kernels = variant().step_kernels(dtype);
  for_ranges(size, limits_of(dtype).elements_per_thread,
             [&](int64_t begin, int64_t end) { kernels.update_rounded(update, gradient, 1, 0, {begin, end}); });
}

// mlp_train_update_ on the CPU. Kernels update contiguous parameters, torch's operations the rest. Allocates everything
// before the first write, so that running out of memory changes nothing.
inline void update(at::ArrayRef<Gradient> gradients) {
  c10::SmallVector<Gradient, 16> dense, others;
  for (const Gradient& g : gradients) {
    const TrainedParameter& p = *g.parameter;
    bool as_kernels_need = p.value->is_contiguous() && (!p.step || p.step->is_cpu());
    for (const at::Tensor* state : p.states) as_kernels_need = as_kernels_need && (!state || state->is_contiguous());
    if (as_kernels_need)
      dense.push_back({&p, cast(g.gradient, p.value->scalar_type()).contiguous()});
    else
      others.push_back(g);
  }
  update_native(others);
  for (const auto& [parameter, gradient] : dense) {
    const TrainedParameter& p = *parameter;
    const Optimizer ready = at_step(*p.optimizer, p.step ? count_of(*p.step) + 1 : 1);
    Update update{p.value->mutable_data_ptr(), {}, &ready};
    p.put_states(update.states);
    update_with(update, gradient.const_data_ptr(), gradient.numel(), dtype_of(gradient));
  }
}

}  // namespace mlp_ext::cpu
