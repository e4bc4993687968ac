// Launches of pointwise.cuh.
#include "cuda/kernels/pointwise.cuh"

#include "cuda/launch/launch.cuh"

namespace mlp_ext::cuda {

cudaError_t launch_act(const ForwardProblem& problem, const Gpu& gpu) {
  return with_types(problem, [&](auto s, auto act) {
    using S = decltype(s);
    using Act = decltype(act);
    const Rows<S> y = typed<S>(problem.y), z = problem.z.data ? typed<S>(problem.z) : y;
    const BiasAct<S> f{problem.M, problem.N, {z.data, z.stride}, nullptr, y};
    const auto kernel = bias_act_vector(f) == 1 ? bias_act<S, Act, 1> : bias_act<S, Act, kVector<S>>;
    return launch(kernel, bias_act_launch(f, gpu), gpu, f, act);
  });
}

namespace {

template <class S>
GradZProblem<S> grad_z_problem(const BackwardProblem& p, void* dz) {
  return {p.M, p.N, typed<S>(p.dy), typed<S>(p.saved), {static_cast<S*>(dz), p.N}, static_cast<S*>(p.db)};
}

// A workspace has the counters of the strips of columns, then the sums of the parts of the rows.
int64_t counter_bytes(const Launch& geometry) { return round_up(geometry.blocks_x * sizeof(unsigned), 16); }

}  // namespace

int64_t grad_z_bytes(const BackwardProblem& problem, const Gpu& gpu) {
  if (!problem.db) return 0;
  return with_types(problem, [&](auto s, auto) {
    using S = decltype(s);
    const Launch geometry = grad_z_launch(grad_z_problem<S>(problem, nullptr), gpu);
    return counter_bytes(geometry) + geometry.blocks_y * problem.N * static_cast<int64_t>(sizeof(Accumulator<S>));
  });
}

cudaError_t launch_grad_z(const BackwardProblem& problem, void* dz, void* workspace, const Gpu& gpu) {
  return with_types(problem, [&](auto s, auto act) {
    using S = decltype(s);
    using Act = decltype(act);
    auto g = grad_z_problem<S>(problem, dz);
    const Launch geometry = grad_z_launch(g, gpu);
    if (g.db) {
      const int64_t counters = counter_bytes(geometry);
      g.finished = static_cast<unsigned*>(workspace);
      g.sums = reinterpret_cast<Accumulator<S>*>(static_cast<char*>(workspace) + counters);
      const auto error = cudaMemsetAsync(g.finished, 0, counters, gpu.stream);
      if (error != cudaSuccess) return error;
    }
    const auto kernel = grad_z_vector(g) == 1 ? grad_z<S, Act, 1> : grad_z<S, Act, kVector<S>>;
    return launch(kernel, geometry, gpu, g, act);
  });
}

namespace {

template <class S>
ElementLoss<S> element_loss_of(const LossProblem& p) {
  return {p.loss,
          p.M,
          p.N,
          typed<S>(p.y),
          typed<S>(p.target),
          static_cast<const S*>(p.weight),
          typed<S>(p.dy),
          static_cast<Accumulator<S>>(p.scale),
          static_cast<S*>(p.value)};
}

constexpr int64_t kCounter = 16;  // bytes of a workspace before the blocks' sums

}  // namespace

int64_t element_loss_bytes(const LossProblem& problem, const Gpu& gpu) {
  return with_dtype(problem.dtype, [&](auto s) {
    using S = decltype(s);
    const int64_t blocks = element_loss_launch(element_loss_of<S>(problem), gpu).blocks();
    return kCounter + blocks * static_cast<int64_t>(sizeof(Accumulator<S>));
  });
}

cudaError_t launch_element_loss(const LossProblem& problem, void* workspace, const Gpu& gpu) {
  const auto error = cudaMemsetAsync(workspace, 0, kCounter, gpu.stream);
  if (error != cudaSuccess) return error;
  return with_dtype(problem.dtype, [&](auto s) {
    using S = decltype(s);
    auto f = element_loss_of<S>(problem);
    f.finished = static_cast<unsigned*>(workspace);
    f.sums = reinterpret_cast<Accumulator<S>*>(static_cast<char*>(workspace) + kCounter);
    const auto kernel = element_loss_vector(f) == 1 ? element_loss<S, 1> : element_loss<S, kVector<S>>;
    return launch(kernel, element_loss_launch(f, gpu), gpu, f);
  });
}

}  // namespace mlp_ext::cuda
