// Launch of step.cuh.
#include "cuda/kernels/step.cuh"

#include "cuda/launch/launch.cuh"

namespace mlp_ext::cuda {

namespace {

template <class S>
StepParameter<S> typed(const StepParameterProblem& p) {
  return {static_cast<S*>(p.value), static_cast<S*>(p.momentum_buffer), p.sgd, p.learns};
}
template <class S>
StepLayer<S> typed(const StepLayerProblem& l) {
  return {static_cast<int>(l.K), static_cast<int>(l.N), static_cast<int>(l.activation), typed<S>(l.weight),
          typed<S>(l.bias)};
}
template <class S>
Steps<S> typed(const StepsProblem& p) {
  Steps<S> f{p.rows,
             p.batch,
             p.order,
             p.input_rows,
             cuda::typed<S>(p.x),
             {static_cast<int>(p.loss), p.mean, cuda::typed<S>(p.target), p.classes, p.classes_stride,
              static_cast<const S*>(p.loss_weight), p.ignore_index, p.label_smoothing},
             static_cast<S*>(p.losses),
             static_cast<int>(p.layers),
             static_cast<int>(p.lowest_learning)};
  for (int64_t l = 0; l < p.layers; ++l) f.layer[l] = typed<S>(p.layer[l]);
  return f;
}

}  // namespace

cudaError_t launch_sgd_steps(const StepsProblem& problem, const Gpu& gpu) {
  return with_dtype(problem.dtype, [&](auto s) {
    auto f = typed<decltype(s)>(problem);
    const Launch geometry = steps_launch(f);
    return launch(sgd_steps<decltype(s)>, geometry, gpu, f);
  });
}

}  // namespace mlp_ext::cuda
