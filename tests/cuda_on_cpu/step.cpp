#include "cuda/kernels/step.cuh"

#include "run.h"

using namespace mlp_ext;
using namespace mlp_ext::cuda;

namespace {

struct ParameterBuffers {
  Buffer value, states[kMaxStates], float_count, double_count;
  double count, hyperparameters[Optimizers::max_parameters];
};
struct LayerBuffers {
  int64_t K, N, activation;
  double parameters[Activations::max_parameters];
  int64_t has_bias, weight_learns, bias_learns;
};
struct NetworkBuffers {
  int64_t rows;
  Buffer order, x, target, classes, losses;
  const ParameterBuffers* parameters;
};
struct StepsBuffers {
  int64_t dtype, epochs, batch, batches, input_rows, loss, mean, optimizer, layers, lowest_learning;
  double loss_parameters[Losses::max_parameters];
  Buffer loss_weight;
  const LayerBuffers* layer;
  int64_t networks, in_table;
  const NetworkBuffers* network;
  int64_t order_of_threads;
};

template <class S>
StepParameter<S> parameter(const ParameterBuffers& p, int64_t optimizer) {
  StepParameter<S> to{pointer<S>(p.value), choose(Optimizers{}, optimizer, p.hyperparameters)};
  for (size_t s = 0; s < kMaxStates; ++s) to.states[s] = pointer<S>(p.states[s]);
  to.count = p.count;
  to.float_count = pointer<const float>(p.float_count);
  to.double_count = pointer<const double>(p.double_count);
  return to;
}
template <class S>
StepData<S> data_of(const NetworkBuffers& n) {
  return {n.rows,
          pointer<const int64_t>(n.order),
          rows<const S>(n.x),
          rows<const S>(n.target),
          pointer<const int64_t>(n.classes),
          pointer<S>(n.losses)};
}

template <class S>
std::string run(const StepsBuffers& p) {
  const LossFunction loss = choose(Losses{}, p.loss, p.loss_parameters);
  Steps<S> f{p.epochs,
             p.batch,
             p.batches,
             p.input_rows,
             {loss, p.mean != 0, p.network[0].classes.stride, ignore_index_of(loss), pointer<const S>(p.loss_weight)},
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
                  from.has_bias != 0,
                  from.weight_learns != 0,
                  from.bias_learns != 0};
    widths[l + 1] = from.N;
  }
  const Launch geometry = steps_launch(f, p.networks);
  constexpr auto dtype = sizeof(S) == 8 ? DType::float64 : DType::float32;
  if (geometry.shared > step_shared_bytes({widths, p.layers, p.batch, dtype, 90, 0}))
    return "more shared memory than planned";
  const int each = static_cast<int>(2 * p.layers);
  std::vector<StepData<S>> data;
  std::vector<StepParameter<S>> parameters;
  for (int64_t n = 0; n < p.networks; ++n) {
    data.push_back(data_of<S>(p.network[n]));
    for (int i = 0; i < each; ++i) parameters.push_back(parameter<S>(p.network[n].parameters[i], p.optimizer));
  }
  const auto run_with = [&](const auto& networks) {
    return model::run(geometry, static_cast<model::Order>(p.order_of_threads), 0, [=] { train_steps(f, networks); });
  };
  if (p.in_table) {
    const auto networks = static_cast<int64_t>(data.size()), count = static_cast<int64_t>(parameters.size());
    return run_with(ManyNetworks<S>{{data.data(), networks}, {parameters.data(), count}, each});
  }
  OneNetwork<S> one{data[0]};
  std::copy(parameters.begin(), parameters.end(), one.parameters);
  return run_with(one);
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
    return ParameterBuffers{value, {momentum_buffer}, {}, {}, 0, {0.1, momentum}};
  };
  const LayerBuffers layers[] = {{p->K, p->N, p->activation, {}, 1, 1, 1}, {p->N, p->K, 0, {}, 0, 1, 0}};
  const ParameterBuffers parameters[] = {sgd(p->w, {}, 0), sgd(p->bias, p->db, 0.9), sgd(p->dw, {}, 0), {}};
  const NetworkBuffers network{p->M, {}, p->x, p->dx, {}, p->y, parameters};
  const StepsBuffers steps{p->dtype, 1,  (p->M + 1) / 2, 2, p->M,        0,        1,       0, 2, 0,
                           {},       {}, layers,         1, p->seed % 2, &network, p->order};
  return train_steps_on_cpu(&steps);
}
