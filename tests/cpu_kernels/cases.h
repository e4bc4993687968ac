// Activations, losses and optimizers under test.
#pragma once

#include "arrays.h"
#include "math/activations.h"
#include "math/losses.h"
#include "math/optimizers.h"

namespace mlp_ext::cpu {

inline Activation activation_of(const char* name) {
  const double numbers[Activations::max_parameters] = {0.1, 20};
  return choose(Activations{}, index_of(name, Activations{}), numbers);
}

struct LossCase {
  const char* name;
  double numbers[Losses::max_parameters];
  bool weighted, of_classes;
};
constexpr LossCase kLosses[] = {{"mse", {}, false, false},
                                {"bce", {}, false, false},
                                {"bce_with_logits", {}, false, false},
                                {"bce_with_logits", {}, true, false},
                                {"l1", {}, false, false},
                                {"smooth_l1", {0.3}, false, false},
                                {"huber", {0.2}, false, false},
                                {"cross_entropy", {-100, 0}, false, true},
                                {"cross_entropy", {2, 0.1}, true, true},
                                {"cross_entropy", {-100, 0.2}, true, false},
                                {"nll", {1}, true, true}};

struct OptimizerCase {
  const char* name;
  double numbers[Optimizers::max_parameters];
};
constexpr OptimizerCase kOptimizers[] = {{"sgd", {0.1}},
                                         {"sgd", {0.1, 0.9, 0.2, 0.01, 1, 1}},
                                         {"adam", {0.01, 0.9, 0.99, 1e-3, 0.1, 1}},
                                         {"adam", {0.01, 0.8, 0.9, 1e-3, 0.1, 0, 0, 1}},
                                         {"rmsprop", {0.01, 0.9, 1e-2, 0.1, 0.5, 1}},
                                         {"adagrad", {0.1, 0.1, 0.01, 1e-3}},
                                         {"accumulate", {0.5}}};

}  // namespace mlp_ext::cpu
