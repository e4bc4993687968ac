// Launches of small.cuh.
#include "cuda/kernels/small.cuh"

#include "cuda/launch/launch.cuh"

namespace mlp_ext::cuda {

cudaError_t launch_small_forward(const ForwardProblem& problem, const Gpu& gpu) {
  return with_types(problem, [&](auto s, auto act) {
    const auto f = typed<decltype(s)>(problem);
    return launch(small_forward<decltype(s), decltype(act)>, small_forward_launch(f), gpu, f, act);
  });
}

cudaError_t launch_small_backward(const BackwardProblem& problem, const Gpu& gpu) {
  return with_types(problem, [&](auto s, auto act) {
    const auto b = typed<decltype(s)>(problem);
    return launch(small_backward<decltype(s), decltype(act)>, small_backward_launch(b), gpu, b, act);
  });
}

}  // namespace mlp_ext::cuda
