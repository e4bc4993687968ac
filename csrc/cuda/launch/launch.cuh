// From problems of any dtype and activation to launches of the kernel compiled for it.
#pragma once

#include "cuda/kernels/problem.cuh"
#include "cuda/launch.h"
#include "math/activations.h"

namespace mlp_ext::cuda {

// f(S()) for the dtype.
template <class F>
auto with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float32:
      return f(float());
    case DType::float64:
      return f(double());
    case DType::bfloat16:
      return f(BFloat16());
    default:
      return f(Half());
  }
}

// f(act): one of TunedActivations, or AnyActivation.
template <class F, class... Tuned>
auto with_kernel_activation(const Activation& activation, TypeList<Tuned...>, const F& f) {
  return visit(activation, [&](auto act) {
    if constexpr ((std::is_same_v<decltype(act), Tuned> || ...))
      return f(act);
    else
      return f(AnyActivation{activation});
  });
}

// f(S(), act) for the dtype and activation of a problem.
template <class Problem, class F>
auto with_types(const Problem& problem, const F& f) {
  return with_kernel_activation(problem.activation, TunedActivations{},
                                [&](auto act) { return with_dtype(problem.dtype, [&](auto s) { return f(s, act); }); });
}

template <class S>
Rows<const S> typed(const ConstMatrix& m) {
  return {static_cast<const S*>(m.data), m.stride};
}
template <class S>
Rows<S> typed(const Matrix& m) {
  return {static_cast<S*>(m.data), m.stride};
}
template <class S>
Forward<S> typed(const ForwardProblem& p) {
  return {p.M, p.K, p.N, typed<S>(p.x), typed<S>(p.w), static_cast<const S*>(p.bias), typed<S>(p.y), typed<S>(p.z)};
}
template <class S>
Backward<S> typed(const BackwardProblem& p) {
  return {p.M,
          p.K,
          p.N,
          typed<S>(p.dy),
          typed<S>(p.saved),
          typed<S>(p.x),
          typed<S>(p.w),
          typed<S>(p.dx),
          static_cast<S*>(p.dw),
          static_cast<S*>(p.db)};
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Launch& geometry, const Gpu& gpu,
                   const Arguments&... arguments) {
  if (geometry.blocks() == 0) return cudaSuccess;
  constexpr int64_t kUnasked = 48 << 10;  // bytes of shared memory that every kernel may have
  if (geometry.shared > kUnasked) {       // asks for the most, so that threads that launch it with other sizes agree
    const auto shared = static_cast<int>(gpu.block_shared);
    const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;
  }
  const dim3 blocks(static_cast<unsigned>(geometry.blocks_x), static_cast<unsigned>(geometry.blocks_y));
  kernel<<<blocks, geometry.threads, geometry.shared, gpu.stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace mlp_ext::cuda
