// The operators mlp_train_step_, training steps of a multi-layer perceptron, each of them forward, loss, backward and
// update, and mlp_train_update_, an update alone. Interface of their backends.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
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
  const at::Tensor& target;                      // [rows, N], or classes [rows] of int64
  at::TensorList parameters;                     // layer by layer: weight [N, K], then bias [N] if it has one
  at::TensorList states;                         // optimizer states of each learning parameter, in order
  at::TensorList steps;                          // step count [] of each learning parameter, if the optimizer has one
  const Names& activations;                      // per layer, names in activations.h
  at::ArrayRef<double> activation_parameters;    // of all layers, in order; empty: the defaults
  std::string_view loss;                         // a name in losses.h
  std::string_view reduction;                    // mean or sum
  const std::optional<at::Tensor>& loss_weight;  // [N]
  at::ArrayRef<double> loss_parameters;          // empty: the defaults
  std::string_view optimizer;                    // a name in optimizers.h
  at::IntArrayRef learning;                      // ascending indices of the parameters to update
  at::ArrayRef<double> hyperparameters;          // all of the optimizer's, for each learning parameter
  std::optional<at::Tensor> order = {};          // int64 row indices into input, batch after batch
  std::optional<int64_t> batch_size = {};        // none: one step of all rows
  at::ArrayRef<double> dropout = {};             // of each layer's input, then of the output; empty: none
  std::optional<at::ScalarType> autocast = {};   // of float32 arguments: layers compute in this dtype
};

// Without batch_size: one step; returns the loss [] before the update. With it: one step per batch, on rows
// order[i * B : (i + 1) * B], or rows in their own order; the last batch may be smaller; returns the losses [steps].
// Parameters, states and steps are updated in place. Through the dispatcher.
at::Tensor mlp_train_step_(const TrainArgs& args);
// Bumps the autograd versions of parameters, states and steps.
void bump_versions(const TrainArgs& args);

// Updates the parameters with these gradients, as a step does. Through the dispatcher.
struct UpdateArgs {
  at::TensorList parameters;             // those that learn
  at::TensorList states;                 // optimizer states of each, in order
  at::TensorList steps;                  // step count [] of each, if the optimizer has one
  at::TensorList gradients;              // like the parameters
  std::string_view optimizer;            // a name in optimizers.h
  at::ArrayRef<double> hyperparameters;  // all of the optimizer's, for each parameter
};
void mlp_train_update_(const UpdateArgs& args);

// A parameter and its update. Points to the operator's arguments.
struct TrainedParameter {
  const at::Tensor* value = nullptr;          // nullptr: no such parameter
  std::optional<Optimizer> optimizer;         // none: it does not learn
  const double* hyperparameters = nullptr;    // of the optimizer
  const at::Tensor* states[kMaxStates] = {};  // nullptr if the optimizer does not use that state
  const at::Tensor* step = nullptr;           // step count, if the optimizer has one

  void put_states(void* (&to)[kMaxStates]) const {
    for (size_t s = 0; s < kMaxStates; ++s) to[s] = states[s] ? states[s]->mutable_data_ptr() : nullptr;
  }
};
struct TrainedLayer {
  TrainedParameter weight, bias;
  Activation activation;
  std::string_view activation_name;  // the same as arguments of linear_act
  at::ArrayRef<double> activation_parameters;
};

// Checked arguments, grouped by layer.
struct Training {
  const at::Tensor &input, &target;
  const at::Tensor* loss_weight;      // or nullptr
  const at::Tensor* order;            // or nullptr
  std::optional<int64_t> batch_size;  // none: one step of all rows
  c10::SmallVector<TrainedLayer, 8> layers;
  LossFunction loss;
  bool mean;
  at::ArrayRef<double> dropout;            // [layers + 1], or empty
  std::optional<at::ScalarType> autocast;  // the dtype of the layers, as under autocast; all else is float32
  bool target_is_classes = false;          // rather than of the output's shape
  size_t lowest_learning = 0;              // the first layer that learns; layers.size() if none does

  int64_t rows() const { return order ? order->size(0) : input.size(0); }
  c10::SmallVector<int64_t, 9> widths() const {  // of the input, then of each layer
    c10::SmallVector<int64_t, 9> widths{input.size(1)};
    for (const TrainedLayer& layer : layers) widths.push_back(layer.weight.value->size(0));
    return widths;
  }
};

// Throws if an argument is invalid; check_memory checks the rest.
Training check_training(const TrainArgs& args);
c10::SmallVector<TrainedParameter, 16> check_update(const UpdateArgs& args);
size_t check_optimizer(const char* op, std::string_view name);  // its index among Optimizers
// Checks that no tensor the steps write overlaps another tensor they read or write. Interleaved views, such as two
// halves of a matrix's columns, count as overlapping.
void check_memory(at::ArrayRef<const Training*> trainings);
// Whether all parameters and states are contiguous, as the kernels need them.
bool is_contiguous(const Training& training);
// Whether all classes are in [0, N) or ignore_index; if not, throws or returns false.
bool check_classes(const Training& training, const at::Tensor& classes, bool throws = true);
// loss_weight as [N]; undefined without one.
at::Tensor weight_row(const Training& training);
// The error of losses of probabilities for outputs or targets outside [0, 1].
[[noreturn]] void throw_not_a_probability();
// A count of steps on the CPU, and a step more. By pointers: operators would take longer than a small network's step,
// and could fail after parameters were updated.
double count_of(const at::Tensor& step);
void advance(const at::Tensor& step, int64_t steps = 1);  // on any device
// Calls f(parameter) for each learning parameter.
template <class F>
void for_learning(const Training& training, const F& f) {
  for (const TrainedLayer& layer : training.layers)
    for (const TrainedParameter* p : {&layer.weight, &layer.bias})
      if (p->optimizer) f(*p);
}

// Autograd then knows that all that a step writes has changed, also where a later step fails.
void bump_versions(const Training& training);

struct LossAndGrad {
  at::Tensor loss, dy;
};
// The loss of outputs y, and its gradient.
LossAndGrad loss_and_grad_native(const Training& training, const at::Tensor& y);
// A parameter that learns and its gradient, which may have another dtype.
struct Gradient {
  const TrainedParameter* parameter;
  at::Tensor gradient;
};
// Updates parameters and states; not the counts of steps.
void update_native(at::ArrayRef<Gradient> gradients);
at::Tensor cast_native(const at::Tensor& t, at::ScalarType dtype);

// What a backend does in its own way in step_by_layers.
struct LayerStep {
  LossAndGrad (*loss_and_grad)(const Training&, const at::Tensor& y) = loss_and_grad_native;
  void (*update)(at::ArrayRef<Gradient>) = update_native;
  at::Tensor (*cast)(const at::Tensor&, at::ScalarType) = cast_native;  // as to(): the same tensor if it has the dtype
};
// One step, layer by layer; updates once all gradients are there, so that an error before changes nothing. Dropout is
// native, so masks are drawn as in an eager loop. Under autocast each tensor is cast where autocast casts it: operands
// of a layer, then the outputs for the loss, dy for backward, dW and db for the update.
at::Tensor step_by_layers(const Training& training, const LayerStep& step = {});
// Loops over batches; `step` takes a Training without order and batch_size.
at::Tensor loop_over_batches(const Training& training, at::Tensor (*step)(const Training&));
// The steps as a composite of native operations: the reference, and the fallback for devices without our kernels.
at::Tensor train_native(const Training& training);

// Adapts a function of TrainArgs to the operator's signature.
template <at::Tensor (*f)(const TrainArgs&)>
at::Tensor with_args(const at::Tensor& input, const at::Tensor& target, at::TensorList parameters,
                     at::TensorList states, at::TensorList steps, const Names& activations,
                     at::ArrayRef<double> activation_parameters, std::string_view loss, std::string_view reduction,
                     const std::optional<at::Tensor>& loss_weight, at::ArrayRef<double> loss_parameters,
                     std::string_view optimizer, at::IntArrayRef learning, at::ArrayRef<double> hyperparameters,
                     const std::optional<at::Tensor>& order, std::optional<int64_t> batch_size,
                     at::ArrayRef<double> dropout, std::optional<at::ScalarType> autocast) {
  return f({input, target, parameters, states, steps, activations, activation_parameters, loss, reduction, loss_weight,
            loss_parameters, optimizer, learning, hyperparameters, order, batch_size, dropout, autocast});
}
// As under no_grad, where parameters that require a gradient may be updated in place. Autocast is an argument: no
// operation called below follows the state of the thread.
struct UpdateGuard {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};
template <at::Tensor (*run)(const Training&)>
at::Tensor checked(const TrainArgs& args) {
  const UpdateGuard guard;
  const Training training = check_training(args);
  const Training* const all[] = {&training};
  check_memory(all);
  bump_versions(training);
  return run(training);
}
// Makes a kernel of the operator from a function of checked arguments:
//   m.impl("mlp_train_step_", train_kernel<run>)
template <at::Tensor (*run)(const Training&)>
constexpr auto* train_kernel = with_args<checked<run>>;

// Makes a kernel of mlp_train_update_ from an update; then advances the steps.
template <void (*update)(at::ArrayRef<Gradient>)>
void update_kernel(at::TensorList parameters, at::TensorList states, at::TensorList steps, at::TensorList gradients,
                   std::string_view optimizer, at::ArrayRef<double> hyperparameters) {
  const UpdateGuard guard;
  const auto checked = check_update({parameters, states, steps, gradients, optimizer, hyperparameters});
  for (const at::TensorList tensors : {parameters, states, steps})
    for (const at::Tensor& t : tensors) t.unsafeGetTensorImpl()->bump_version();
  c10::SmallVector<Gradient, 16> all;
  for (size_t i = 0; i < checked.size(); ++i) all.push_back({&checked[i], gradients[i]});
  update(all);
  for (const at::Tensor& step : steps) advance(step);
}

}  // namespace mlp_ext
