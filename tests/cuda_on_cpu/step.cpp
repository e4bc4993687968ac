#include "cuda/kernels/step.cuh"

#include "run.h"

using namespace mlp_ext;
using namespace mlp_ext::cuda;

namespace {

struct ParameterBuffers {
  Buffer value, states[kMaxStates], float_count, double_count;
  double count, hyperparameters[Optimizers::max_parameters];
  int64_t learns;
};
struct LayerBuffers {
  int64_t K, N, activation;
  double parameters[Activations::max_parameters];
  ParameterBuffers weight, bias;
};
struct StepsBuffers {
  int64_t dtype, rows, batch, input_rows, loss, mean, optimizer, layers, lowest_learning;
  double loss_parameters[Losses::max_parameters];
  Buffer order, x, target, classes, loss_weight, losses;
  const LayerBuffers* layer;
  int64_t order_of_threads;
};

template <class S>
StepParameter<S> parameter(const ParameterBuffers& p, int64_t optimizer) {
  StepParameter<S> to{pointer<S>(p.value), p.learns != 0, choose(Optimizers{}, optimizer, p.hyperparameters)};
  for (size_t s = 0; s < kMaxStates; ++s) to.states[s] = pointer<S>(p.states[s]);
  to.count = p.count;
  to.float_count = pointer<const float>(p.float_count);
  to.double_count = pointer<const double>(p.double_count);
  return to;
}

template <class S>
std::string run(const StepsBuffers& p) {
  const LossFunction loss = choose(Losses{}, p.loss, p.loss_parameters);
  Steps<S> f{p.rows,
             p.batch,
             pointer<const int64_t>(p.order),
             p.input_rows,
             rows<const S>(p.x),
             {loss, p.mean != 0, rows<const S>(p.target), pointer<const int64_t>(p.classes), p.classes.stride,
              ignore_index_of(loss), pointer<const S>(p.loss_weight)},
             pointer<S>(p.losses),
             static_cast<int>(p.layers),
             static_cast<int>(p.lowest_learning)};
  int64_t widths[kStepLayers + 1] = {p.layer[0].K};
  for (int l = 0; l < p.layers; ++l) {
    const LayerBuffers& from = p.layer[l];
    const Activation activation = choose(Activations{}, from.activation, from.parameters);
    f.layer[l] = {static_cast<int>(from.K),
                  static_cast<int>(from.N),
                  activation,
                  needs_of(activation) == Needs::preactivation,
                  parameter<S>(from.weight, p.optimizer),
                  parameter<S>(from.bias, p.optimizer)};
    widths[l + 1] = from.N;
  }
  const Launch geometry = steps_launch(f);
  constexpr auto dtype = sizeof(S) == 8 ? DType::float64 : DType::float32;
  if (geometry.shared > step_shared_bytes({widths, p.layers, p.batch, dtype, 90, 0}))
    return "more shared memory than planned";
  return model::run(geometry, static_cast<model::Order>(p.order_of_threads), 0, [=] { train_steps<S>(f); });
}

std::string run(const StepsBuffers& p) {
#if defined(MUTANT)
  return run<float>(p);
#else
  return p.dtype == 0 ? run<float>(p) : p.dtype == 1 ? run<double>(p) : p.dtype == 2 ? run<BFloat16>(p) : run<Half>(p);
#endif
}

}  // namespace

extern "C" const char* train_steps_on_cpu(const StepsBuffers* p) {
  static std::string fault;
  fault = run(*p);
  return fault.empty() ? nullptr : fault.c_str();
}

// For the sanitizers, a K-N-K network in the arrays that the other kernels take.
extern "C" const char* sgd_step_on_cpu(const Problem* p) {
  const auto sgd = [](const Buffer& value, const Buffer& momentum_buffer, double momentum) {
    return ParameterBuffers{value, {momentum_buffer}, {}, {}, 0, {0.1, momentum}, 1};
  };
  const LayerBuffers layers[] = {
      {p->K, p->N, p->activation, {}, sgd(p->w, {}, 0), sgd(p->bias, p->db, 0.9)},
      {p->N, p->K, 0, {}, sgd(p->dw, {}, 0), {}},
  };
  const StepsBuffers steps{p->dtype, p->M, (p->M + 1) / 2, p->M,  0,  1,  0,    2,      0,
                           {},       {},   p->x,           p->dx, {}, {}, p->y, layers, p->order};
  return train_steps_on_cpu(&steps);
}
