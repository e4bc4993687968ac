// The operator mlp_train_step_: training steps of a multi-layer perceptron, each of them forward, loss, backward and
// update. What its backends share.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <optional>
#include <string>
#include <string_view>

#include "math/activations.h"
#include "math/losses.h"
#include "math/optimizers.h"
#include "ops/mlp.h"

namespace mlp_ext {

// The operator's arguments, in its order.
struct TrainArgs {
  const at::Tensor& input;                       // [rows, K]
  const at::Tensor& target;                      // as the output [rows, N], or classes [rows] of int64
  at::TensorList parameters;                     // of each layer weight [N, K] and, if it has one, bias [N], in order
  at::TensorList states;                         // of each that learns the optimizer's states that it has, in order
  at::TensorList steps;                          // of each that learns its count of steps [], if the optimizer counts
  const Names& activations;                      // of each layer, names in activations.h
  at::ArrayRef<double> activation_parameters;    // of all layers, in order; empty: the defaults
  std::string_view loss;                         // a name in losses.h
  std::string_view reduction;                    // mean or sum
  const std::optional<at::Tensor>& loss_weight;  // [N]
  at::ArrayRef<double> loss_parameters;          // empty: the defaults
  std::string_view optimizer;                    // a name in optimizers.h
  at::IntArrayRef learning;                      // the indices among parameters of those to update, rising
  at::ArrayRef<double> hyperparameters;          // of each of these all of the optimizer's, in order
  const std::optional<at::Tensor>& order;        // [steps' rows] of int64: indices of rows of input, batch after batch
  std::optional<int64_t> batch_size;             // none: one step of all rows
};

// Without batch_size: one step; returns the loss [] of before the update. With it: a step for each batch of rows
// order[i batch_size : (i + 1) batch_size], or of the rows as they lie; the last may be smaller; returns the losses
// [steps]. Parameters, states and steps change in place. Through the dispatcher.
at::Tensor mlp_train_step_(const TrainArgs& args);
// Tells autograd that parameters, states and steps changed.
void bump_versions(const TrainArgs& args);

// A parameter, and how it is updated. Points to the operator's arguments.
struct TrainedParameter {
  const at::Tensor* value = nullptr;          // nullptr: there is none
  std::optional<Optimizer> optimizer;         // none: it does not learn
  const double* hyperparameters = nullptr;    // that optimizer is made of
  const at::Tensor* states[kMaxStates] = {};  // nullptr where the optimizer does not have that state
  const at::Tensor* step = nullptr;           // its count of steps, if the optimizer counts
};
struct TrainedLayer {
  TrainedParameter weight, bias;
  Activation activation;
  std::string_view activation_name;  // the same as the operator linear_act takes it
  at::ArrayRef<double> activation_parameters;
};

// The arguments of training steps, checked and sorted by layer.
struct Training {
  const at::Tensor &input, &target;
  const at::Tensor* loss_weight;      // or nullptr
  const at::Tensor* order;            // or nullptr
  std::optional<int64_t> batch_size;  // none: one step of all rows
  c10::SmallVector<TrainedLayer, 8> layers;
  LossFunction loss;
  bool mean;
  bool target_is_classes = false;  // rather than of the output's shape
  size_t lowest_learning = 0;      // the first layer that learns; layers.size() if none does

  int64_t rows() const { return order ? order->size(0) : input.size(0); }
};

// Throws unless all fits.
Training check_training(const TrainArgs& args);
// Whether parameters and states lie without gaps, as the kernels need them.
bool is_contiguous(const Training& training);
// Throws where a class in the target is neither ignore_index nor one of N.
void check_classes(const Training& training);
// Throws what a loss of probabilities throws for outputs or targets outside [0, 1].
[[noreturn]] void throw_not_a_probability();
// f(parameter) for each that learns.
template <class F>
void for_learning(const Training& training, const F& f) {
  for (const TrainedLayer& layer : training.layers)
    for (const TrainedParameter* p : {&layer.weight, &layer.bias})
      if (p->optimizer) f(*p);
}

struct LossAndGrad {
  at::Tensor loss, dy;
};
// The loss of outputs y, and its gradient.
LossAndGrad loss_and_grad_native(const Training& training, const at::Tensor& y);
// One step, layer by layer, with that loss: of native operations but for the layers and the loss.
at::Tensor step_by_layers(const Training& training, LossAndGrad (*loss_and_grad)(const Training&, const at::Tensor&));
// The steps of all batches as a loop over `step`, which takes a training without order and batch_size.
at::Tensor loop_over_batches(const Training& training, at::Tensor (*step)(const Training&));
// The steps as a composite of native operations: the reference, and what runs where no kernel of ours does.
at::Tensor train_native(const Training& training);

// An operator's function from one of TrainArgs.
template <at::Tensor (*f)(const TrainArgs&)>
at::Tensor with_args(const at::Tensor& input, const at::Tensor& target, at::TensorList parameters,
                     at::TensorList states, at::TensorList steps, const Names& activations,
                     at::ArrayRef<double> activation_parameters, std::string_view loss, std::string_view reduction,
                     const std::optional<at::Tensor>& loss_weight, at::ArrayRef<double> loss_parameters,
                     std::string_view optimizer, at::IntArrayRef learning, at::ArrayRef<double> hyperparameters,
                     const std::optional<at::Tensor>& order, std::optional<int64_t> batch_size) {
  return f({input, target, parameters, states, steps, activations, activation_parameters, loss, reduction, loss_weight,
            loss_parameters, optimizer, learning, hyperparameters, order, batch_size});
}
template <at::Tensor (*run)(const Training&)>
at::Tensor checked(const TrainArgs& args) {
  return run(check_training(args));
}
// A kernel of the operator from what it does with checked arguments:
//   m.impl("mlp_train_step_", train_kernel<run>)
template <at::Tensor (*run)(const Training&)>
constexpr auto* train_kernel = with_args<checked<run>>;

}  // namespace mlp_ext
