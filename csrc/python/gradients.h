// Gradients between backward and the update, for steps that sum, average or clip them.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>
#include <c10/util/SmallVector.h>

#include <atomic>
#include <limits>
#include <optional>

#include "python/optimizer_state.h"

namespace mlp_ext {

// A call of a TrainStep. While it lives, another one throws, whether of another thread or of Python code that runs
// within the first, such as a signal handler.
class OneCall {
 public:
  OneCall(std::atomic<bool>& running, const char* name) : running_(running) {
    TORCH_CHECK(!running_.exchange(true), name,
                ": another call of it is running; call it from one thread at a time, "
                "as under a threading.Lock, or give each thread its own model, optimizer and ",
                name);
  }
  ~OneCall() { running_ = false; }
  OneCall(const OneCall&) = delete;

 private:
  std::atomic<bool>& running_;
};

// The sum of a group of steps: one flat buffer, and a view of it for each parameter that learns. Belongs to a TrainStep
// and survives its Trainers.
class Gradients {
 public:
  Gradients(std::optional<double> max_norm, int64_t accumulate) : max_norm_(max_norm), accumulate_(accumulate) {
    TORCH_CHECK_VALUE(!max_norm || *max_norm >= 0, "TrainStep: max_norm must be from 0 on, got ", *max_norm);
    TORCH_CHECK_VALUE(accumulate >= 1, "TrainStep: accumulate must be from 1 on, got ", accumulate);
  }

  OneCall one_call(const char* name) { return {running_, name}; }

  // Whether each step is followed by its own update, with the gradients as they are.
  bool is_plain() const { return !max_norm_ && accumulate_ == 1; }
  // Whether some steps wait for their update.
  bool is_pending() const { return count_ > 0; }
  double scale() const { return 1 / static_cast<double>(accumulate_); }
  const at::Tensor& flat() const { return flat_; }
  at::TensorList views() const { return views_; }

  // Before a step: buffers for its parameters, of zeros if it is the first of a group.
  void begin_step(const OptimizerState& now) {
    c10::SmallVector<at::Tensor, 16> learning;
    for (const int64_t index : now.learning) learning.push_back(now.parameters[index]);
    const bool fits = std::equal(views_.begin(), views_.end(), learning.begin(), learning.end(),
                                 [](const at::Tensor& view, const at::Tensor& p) {
                                   return view.sizes() == p.sizes() && view.options().type_equal(p.options()) &&
                                          view.device() == p.device();
                                 });
    if (is_pending()) {
      TORCH_CHECK(fits && identities_ == now.identities(),
                  "TrainStep: other parameters learn than in the steps before, whose gradients are not yet applied; "
                  "change what learns only after ",
                  accumulate_, " steps, or make a new TrainStep");
      return;
    }
    identities_ = now.identities();
    if (!fits) allocate(learning);
    flat_.zero_();
  }
  // After a step; whether the group is complete.
  bool end_step() { return ++count_ == accumulate_; }
  void end_group() { count_ = 0; }

  // As torch.nn.utils.clip_grad_norm_.
  void clip() const {
    if (!max_norm_) return;
    const at::Tensor norm = at::linalg_vector_norm(at::stack(at::_foreach_norm(views_, 2)), 2);
    flat_.mul_((*max_norm_ / (norm + 1e-6)).clamp_max(1));
  }

 private:
  void allocate(at::TensorList parameters) {
    int64_t size = 0, begin = 0;
    for (const at::Tensor& p : parameters) size += p.numel();
    flat_ = at::empty({size}, parameters[0].options().requires_grad(false));
    views_.clear();
    for (const at::Tensor& p : parameters) {
      views_.push_back(flat_.narrow(0, begin, p.numel()).view(p.sizes()));
      begin += p.numel();
    }
  }

  const std::optional<double> max_norm_;
  const int64_t accumulate_;
  std::atomic<bool> running_{false};
  int64_t count_ = 0;  // steps since the last update
  at::Tensor flat_;
  std::vector<at::Tensor> views_;
  std::vector<const void*> identities_;  // of the parameters in a pending group
};

}  // namespace mlp_ext
