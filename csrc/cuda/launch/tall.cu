// Launches of tall.cuh.
#include "cuda/kernels/tall.cuh"

#include "cuda/launch/launch.cuh"

namespace mlp_ext::cuda {

cudaError_t launch_tall_forward(const ForwardProblem& problem, const Gpu& gpu) {
  return with_types(problem, [&](auto s, auto act) {
    const auto f = typed<decltype(s)>(problem);
    return launch(tall_forward<decltype(s), decltype(act)>, tall_forward_launch(f, gpu), gpu, f, act);
  });
}

// Each block has its own sums of dW and db.
int64_t tall_backward_bytes(const BackwardProblem& problem, const Gpu& gpu) {
  return with_types(problem, [&](auto s, auto) {
    using S = decltype(s);
    const auto b = typed<S>(problem);
    const int64_t blocks = tall_backward_launch(b, gpu).blocks();
    return blocks * tall_backward_part(b) * static_cast<int64_t>(sizeof(Accumulator<S>));
  });
}

cudaError_t launch_tall_backward(const BackwardProblem& problem, void* workspace, const Gpu& gpu) {
  return with_types(problem, [&](auto s, auto act) {
    using S = decltype(s);
    const auto b = typed<S>(problem);
    const auto parts = static_cast<Accumulator<S>*>(workspace);
    const Launch rows = tall_backward_launch(b, gpu);
    const auto error = launch(tall_backward<S, decltype(act)>, rows, gpu, b, act, parts);
    return error == cudaSuccess ? launch(sum_parts<S>, sum_parts_launch(b), gpu, parts, rows.blocks(), b) : error;
  });
}

}  // namespace mlp_ext::cuda
