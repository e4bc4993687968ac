// Launches of step.cuh.
#include "cuda/kernels/step.cuh"

#include "cuda/launch/launch.cuh"

namespace mlp_ext::cuda {

namespace {

template <class S>
StepParameter<S> typed(const StepParameterProblem& p) {
  StepParameter<S> to{static_cast<S*>(p.value), p.optimizer};
  for (size_t s = 0; s < kMaxStates; ++s) to.states[s] = static_cast<S*>(p.states[s]);
  to.count = p.count;
  to.float_count = p.float_count;
  to.double_count = p.double_count;
  return to;
}
template <class S>
StepData<S> data_of(const StepNetworkProblem& p) {
  return {p.rows, p.order, cuda::typed<S>(p.x), cuda::typed<S>(p.target), p.classes, static_cast<S*>(p.losses)};
}
StepLayer typed(const StepLayerProblem& l) {
  return {static_cast<int>(l.K),
          static_cast<int>(l.N),
          l.activation,
          needs_of(l.activation) == Needs::preactivation,
          l.has_bias,
          l.weight_learns,
          l.bias_learns};
}
template <class S>
Steps<S> typed(const StepsProblem& p) {
  Steps<S> f{p.epochs,
             p.batch,
             p.batches,
             p.input_rows,
             {p.loss, p.mean, p.classes_stride, p.ignore_index, static_cast<const S*>(p.loss_weight)},
             static_cast<int>(p.layers),
             static_cast<int>(p.lowest_learning)};
  for (int64_t l = 0; l < p.layers; ++l) f.layer[l] = typed(p.layer[l]);
  return f;
}

// The networks' data, then the parameters of each.
template <class S>
struct NetworkTable {
  NetworkTable(const StepsProblem& problem, int64_t networks, void* table)
      : each(2 * problem.layers),
        data(static_cast<StepData<S>*>(table)),
        parameters(reinterpret_cast<StepParameter<S>*>(data + networks)) {}
  int64_t each;
  StepData<S>* data;
  StepParameter<S>* parameters;
};

template <class S, class Networks>
cudaError_t launch_steps(const StepsProblem& problem, int64_t blocks, const Networks& networks, const Gpu& gpu) {
  static_assert(sizeof(Steps<S>) + sizeof(Networks) <= 4096, "what a kernel's arguments may have on every GPU");
  auto f = typed<S>(problem);
  const Launch geometry = steps_launch(f, blocks);
  return launch(train_steps<S, Networks>, geometry, gpu, f, networks);
}

}  // namespace

cudaError_t launch_train_steps(const StepsProblem& problem, const StepNetworkProblem& network, const Gpu& gpu) {
  return with_dtype(problem.dtype, [&](auto s) {
    using S = decltype(s);
    OneNetwork<S> one{data_of<S>(network)};
    for (int64_t i = 0; i < 2 * problem.layers; ++i) one.parameters[i] = typed<S>(network.parameters[i]);
    return launch_steps<S>(problem, network.rows > 0 ? 1 : 0, one, gpu);
  });
}

int64_t network_table_bytes(const StepsProblem& problem, int64_t networks) {
  return with_dtype(problem.dtype, [&](auto s) -> int64_t {
    using S = decltype(s);
    return networks * (sizeof(StepData<S>) + 2 * problem.layers * sizeof(StepParameter<S>));
  });
}

void put_network(const StepsProblem& problem, int64_t networks, int64_t index, const StepNetworkProblem& network,
                 void* table) {
  with_dtype(problem.dtype, [&](auto s) {
    using S = decltype(s);
    const NetworkTable<S> to(problem, networks, table);
    to.data[index] = data_of<S>(network);
    for (int64_t i = 0; i < to.each; ++i) to.parameters[index * to.each + i] = typed<S>(network.parameters[i]);
  });
}

cudaError_t launch_train_networks(const StepsProblem& problem, int64_t networks, const void* table, const Gpu& gpu) {
  return with_dtype(problem.dtype, [&](auto s) {
    using S = decltype(s);
    const NetworkTable<S> from(problem, networks, const_cast<void*>(table));
    const ManyNetworks<S> many{from.data, from.parameters, static_cast<int>(from.each)};
    return launch_steps<S>(problem, networks, many, gpu);
  });
}

}  // namespace mlp_ext::cuda
