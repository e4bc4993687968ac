// The operator mlp_train_many_: training steps of many networks with the same layers, in one call. Interface of its
// backends.
#pragma once

#include <exception>
#include <vector>

#include "ops/train.h"

namespace mlp_ext {

// The operator's arguments, in its order. Parameters, states, steps and hyperparameters are those of mlp_train_step_,
// network after network.
struct TrainManyArgs {
  const at::Tensor& input;   // [rows, K] for all networks, or [networks, rows, K]
  const at::Tensor& target;  // [rows, N] or classes [rows], or with a leading dimension of networks
  at::TensorList parameters;
  at::TensorList states;
  at::TensorList steps;
  const Names& activations;
  at::ArrayRef<double> activation_parameters;
  std::string_view loss;
  std::string_view reduction;
  const std::optional<at::Tensor>& loss_weight;
  at::ArrayRef<double> loss_parameters;
  std::string_view optimizer;
  at::IntArrayRef learning;  // indices among the parameters of a network, the same for all
  at::ArrayRef<double> hyperparameters;
  at::TensorList orders;  // int64 row indices: none, one [epochs, n] for all networks, or one [epochs, n] for each
  int64_t networks, epochs, batch_size;
  at::ArrayRef<double> dropout;
};

// Runs `epochs` epochs of each network in batches of batch_size; the last batch of an epoch may be smaller. Returns the
// losses before each update, [networks, epochs * batches]. A network whose epoch has fewer batches than others' leaves
// zeros at the end of each epoch. Through the dispatcher.
at::Tensor mlp_train_many_(const TrainManyArgs& args);

// A network and its rows. Points to the operator's arguments.
struct TrainedNetwork {
  Training training;                  // of all input rows, without order and batch_size
  const at::Tensor* order = nullptr;  // [epochs, n], or nullptr: rows in their own order

  int64_t rows() const { return order ? order->size(1) : training.input.size(0); }  // of an epoch
};

// Checked arguments.
struct TrainingOfMany {
  std::vector<at::Tensor> inputs, targets;  // one, or one for each network
  std::vector<TrainedNetwork> networks;
  int64_t epochs, batch_size;

  // Number of batches in the longest epoch.
  int64_t batches() const {
    int64_t most = 0;
    for (const TrainedNetwork& n : networks) most = std::max(most, (n.rows() + batch_size - 1) / batch_size);
    return most;
  }
};
TrainingOfMany check_training_of_many(const TrainManyArgs& args);

// Errors of single networks, while the others are trained. May be used by several threads, each for networks of its
// own.
class NetworkErrors {
 public:
  explicit NetworkErrors(size_t networks) : errors_(networks) {}
  // Runs f(), and notes its error for this network.
  template <class F>
  void run(size_t network, const F& f) {
    try {
      f();
    } catch (...) {
      errors_[network] = std::current_exception();
    }
  }
  // Runs f(), and notes its error for each of these networks.
  template <class Networks, class F>
  void run_all(const Networks& networks, const F& f) {
    try {
      f();
    } catch (...) {
      for (const auto network : networks) errors_[network] = std::current_exception();
    }
  }
  // Throws the error of the first network that has one; its message names the network. Where there is a FailedNetworks,
  // notes them there instead.
  void rethrow() const;

 private:
  std::vector<std::exception_ptr> errors_;  // per network; allocated before, since memory may have run out
};

// While it lives, calls of the operator in this thread note networks that fail here, and return the losses of the
// others.
struct FailedNetworks {
  FailedNetworks();
  ~FailedNetworks();
  FailedNetworks(const FailedNetworks&) = delete;

  std::vector<size_t> networks;  // ascending
  std::exception_ptr first_error;

 private:
  FailedNetworks* const outer_;
};

// All epochs of one network by a backend of mlp_train_step_. losses: [epochs * batches].
void train_one(const TrainingOfMany& many, const TrainedNetwork& network, const at::Tensor& losses,
               at::Tensor (*train)(const Training&));
// One network after another.
at::Tensor train_in_turn(const TrainingOfMany& many, at::Tensor (*train)(const Training&));

// Adapts a function of checked arguments to the operator's signature.
template <at::Tensor (*run)(const TrainingOfMany&)>
at::Tensor train_many_kernel(const at::Tensor& input, const at::Tensor& target, at::TensorList parameters,
                             at::TensorList states, at::TensorList steps, const Names& activations,
                             at::ArrayRef<double> activation_parameters, std::string_view loss,
                             std::string_view reduction, const std::optional<at::Tensor>& loss_weight,
                             at::ArrayRef<double> loss_parameters, std::string_view optimizer, at::IntArrayRef learning,
                             at::ArrayRef<double> hyperparameters, at::TensorList orders, int64_t networks,
                             int64_t epochs, int64_t batch_size, at::ArrayRef<double> dropout) {
  const UpdateGuard guard;
  const TrainingOfMany many = check_training_of_many(
      {input, target, parameters, states, steps, activations, activation_parameters, loss, reduction, loss_weight,
       loss_parameters, optimizer, learning, hyperparameters, orders, networks, epochs, batch_size, dropout});
  for (const TrainedNetwork& network : many.networks) bump_versions(network.training);
  return run(many);
}

}  // namespace mlp_ext
