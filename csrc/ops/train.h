// The operator mlp_sgd_step_: a whole training step of a multi-layer perceptron. What its backends share.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <optional>
#include <string>
#include <string_view>

#include "math/optimizers.h"

namespace mlp_ext {

// Forward, loss, backward, and torch.optim.SGD's update in place; returns the loss [], of before the update. Through
// the dispatcher.
at::Tensor mlp_sgd_step_(
    const at::Tensor& input,                       // [M, K]
    const at::Tensor& target,                      // as the output; cross_entropy: [M] of int64, or as the output
    at::TensorList parameters,                     // of each layer weight [N, K] and, if it has one, bias [N], in order
    at::TensorList momentum_buffers,               // of those that learn with momentum, in order, like the parameter
    const c10::List<std::string>& activations,     // of each layer, a name in activations.h
    std::string_view loss,                         // a name in losses.h
    std::string_view reduction,                    // mean or sum
    const std::optional<at::Tensor>& loss_weight,  // [N] for cross_entropy
    int64_t ignore_index, double label_smoothing,  // of cross_entropy
    at::IntArrayRef learning,                      // the places among parameters of those to update, rising
    at::ArrayRef<double> hyperparameters);         // of each of these: Sgd, member by member

// The same over batch after batch: batch i has the rows of order from i batch_size on, the last one may be short.
// Returns the losses [steps]. Through the dispatcher.
at::Tensor mlp_sgd_steps_(
    const at::Tensor& input, const at::Tensor& target, at::TensorList parameters, at::TensorList momentum_buffers,
    const c10::List<std::string>& activations, std::string_view loss, std::string_view reduction,
    const std::optional<at::Tensor>& loss_weight, int64_t ignore_index, double label_smoothing,
    at::IntArrayRef learning, at::ArrayRef<double> hyperparameters,
    const std::optional<at::Tensor>& order,  // [rows] of int64, places among the rows of the input; none: as they lie
    int64_t batch_size);
// As a loop over mlp_sgd_step_.
at::Tensor mlp_sgd_steps_native(const at::Tensor& input, const at::Tensor& target, at::TensorList parameters,
                                at::TensorList momentum_buffers, const c10::List<std::string>& activations,
                                std::string_view loss, std::string_view reduction,
                                const std::optional<at::Tensor>& loss_weight, int64_t ignore_index,
                                double label_smoothing, at::IntArrayRef learning, at::ArrayRef<double> hyperparameters,
                                const std::optional<at::Tensor>& order, int64_t batch_size);

// Throws unless they fit; the rows of all steps.
c10::SymInt check_batches(const at::Tensor& input, const std::optional<at::Tensor>& order, int64_t batch_size);

// Tells autograd what a step has changed.
void bump_versions(at::TensorList parameters, at::TensorList momentum_buffers, at::IntArrayRef learning);

// A parameter, and how it is updated. Points to arguments of the operator.
struct StepParameter {
  const at::Tensor* value = nullptr;            // nullptr: there is none
  const at::Tensor* momentum_buffer = nullptr;  // where it learns with momentum
  std::optional<Sgd> sgd;                       // none: it does not learn
};
struct StepLayer {
  StepParameter weight, bias;
  size_t activation = 0;  // its place in Activations
};
// The arguments of a step, checked and sorted by layer.
struct Step {
  const at::Tensor &input, &target;
  const at::Tensor* loss_weight;  // or nullptr
  c10::SmallVector<StepLayer, 8> layers;
  size_t loss;  // its place in Losses
  bool mean;
  int64_t ignore_index;
  double label_smoothing;
  bool target_is_classes = false;  // rather than probabilities
  size_t lowest_learning = 0;      // the first layer that learns; layers.size() if none does
};

// Throws unless all fits.
Step check_step(const at::Tensor& input, const at::Tensor& target, at::TensorList parameters,
                at::TensorList momentum_buffers, const c10::List<std::string>& activations, std::string_view loss,
                std::string_view reduction, const std::optional<at::Tensor>& loss_weight, int64_t ignore_index,
                double label_smoothing, at::IntArrayRef learning, at::ArrayRef<double> hyperparameters);
// Whether the parameters and their momentum buffers lie without gaps, as the kernels need them.
bool is_contiguous(const Step& step);
// Throws where a class in the target is neither ignore_index nor one of N.
void check_classes(const Step& step);
// What BCE does about outputs or targets that lie outside [0, 1].
[[noreturn]] void throw_not_a_probability();

struct LossAndGrad {
  at::Tensor loss, dy;
};
LossAndGrad loss_and_grad_native(const Step& step, const at::Tensor& y);

// The step layer by layer, with that loss.
at::Tensor step_by_layers(const Step& step, LossAndGrad (*loss_and_grad)(const Step&, const at::Tensor&));
// The step as a composite of native operations: the reference, and what runs where no kernel of ours does.
at::Tensor step_native(const Step& step);

// A kernel of the operator from what it does with checked arguments.
template <at::Tensor (*run)(const Step&)>
at::Tensor checked_step(const at::Tensor& input, const at::Tensor& target, at::TensorList parameters,
                        at::TensorList momentum_buffers, const c10::List<std::string>& activations,
                        std::string_view loss, std::string_view reduction, const std::optional<at::Tensor>& loss_weight,
                        int64_t ignore_index, double label_smoothing, at::IntArrayRef learning,
                        at::ArrayRef<double> hyperparameters) {
  return run(check_step(input, target, parameters, momentum_buffers, activations, loss, reduction, loss_weight,
                        ignore_index, label_smoothing, learning, hyperparameters));
}

}  // namespace mlp_ext
