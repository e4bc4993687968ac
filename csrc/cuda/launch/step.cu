// Launch of step.cuh.
#include "cuda/kernels/step.cuh"

#include "cuda/launch/launch.cuh"

namespace mlp_ext::cuda {

namespace {

template <class S>
StepParameter<S> typed(const StepParameterProblem& p) {
  StepParameter<S> to{static_cast<S*>(p.value), p.learns, p.optimizer};
  for (size_t s = 0; s < kMaxStates; ++s) to.states[s] = static_cast<S*>(p.states[s]);
  to.count = p.count;
  to.float_count = p.float_count;
  to.double_count = p.double_count;
  return to;
}
template <class S>
StepLayer<S> typed(const StepLayerProblem& l) {
  return {static_cast<int>(l.K), static_cast<int>(l.N), l.activation, needs_of(l.activation) == Needs::preactivation,
          typed<S>(l.weight),    typed<S>(l.bias)};
}
template <class S>
Steps<S> typed(const StepsProblem& p) {
  static_assert(sizeof(Steps<S>) <= 4096, "what a kernel's arguments may have on every GPU");
  Steps<S> f{p.rows,
             p.batch,
             p.order,
             p.input_rows,
             cuda::typed<S>(p.x),
             {p.loss, p.mean, cuda::typed<S>(p.target), p.classes, p.classes_stride, p.ignore_index,
              static_cast<const S*>(p.loss_weight)},
             static_cast<S*>(p.losses),
             static_cast<int>(p.layers),
             static_cast<int>(p.lowest_learning)};
  for (int64_t l = 0; l < p.layers; ++l) f.layer[l] = typed<S>(p.layer[l]);
  return f;
}

}  // namespace

cudaError_t launch_train_steps(const StepsProblem& problem, const Gpu& gpu) {
  return with_dtype(problem.dtype, [&](auto s) {
    auto f = typed<decltype(s)>(problem);
    const Launch geometry = steps_launch(f);
    return launch(train_steps<decltype(s)>, geometry, gpu, f);
  });
}

}  // namespace mlp_ext::cuda
