// The product with bias and activation in its epilogue, for compute capability 9.0: CUTLASS's warp-specialised kernel,
// fed by TMA. cublasLt has no epilogue for most activations; here the functor of activations.h is one.
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "cuda/launch.h"
#include "math/activations.h"

namespace mlp_ext::cuda {
namespace {

// An activation as precise as a result of 16 bits needs.
template <class Act>
struct InEpilogue : Act {};
template <>
struct InEpilogue<Sigmoid> {  // with the standard library's functions it took a third of a large product's time
  CUTLASS_DEVICE float forward(float z) const { return __fdividef(1, 1 + __expf(-z)); }
};

template <class Act>
struct OfFragment {  // an activation as CUTLASS calls it, on a fragment of accumulators
  template <class Fragment>
  struct Functor {
    CUTLASS_DEVICE Fragment operator()(Fragment z) const {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < Fragment::kElements; ++i) z[i] = InEpilogue<Act>{}.forward(z[i]);
      return z;
    }
  };
};

// y = act(x W^T + b)
template <class S, class Act>
struct Product {
  using RowMajor = cutlass::layout::RowMajor;
  using ColumnMajor = cutlass::layout::ColumnMajor;
  using Tile = cute::Shape<cute::_128, cute::_128, cute::_64>;
  using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;  // two tiles of rows share each piece of W
  static constexpr int kVector = 16 / sizeof(S);

  using Finish = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, RowMajor, kVector, S, RowMajor, kVector,
      cutlass::epilogue::TmaWarpSpecialized,
      cutlass::epilogue::fusion::LinCombPerColBiasEltAct<OfFragment<Act>::template Functor, S, float, S,
                                                         S>>::CollectiveOp;
  using Main = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, S, RowMajor, kVector, S, ColumnMajor, kVector, float, Tile,
      Cluster, cutlass::gemm::collective::StageCountAutoCarveout<sizeof(typename Finish::SharedStorage)>,
      cutlass::gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Main, Finish>;

  static cudaError_t run(const ForwardProblem& p, const Gpu& gpu) {
    const auto size = [](int64_t n) { return static_cast<int>(n); };
    typename Kernel::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {size(p.M), size(p.N), size(p.K), 1},
        {static_cast<const S*>(p.x.data), {p.x.stride, {}, {}}, static_cast<const S*>(p.w.data), {p.w.stride, {}, {}}},
        {{}, nullptr, {}, static_cast<S*>(p.y.data), {p.y.stride, {}, {}}},
        {}};
    arguments.epilogue.thread.bias_ptr = static_cast<const S*>(p.bias);
    arguments.hw_info.sm_count = gpu.processors;
    cutlass::gemm::device::GemmUniversalAdapter<Kernel> gemm;
    const bool launched = gemm(arguments, nullptr, gpu.stream) == cutlass::Status::kSuccess;
    return launched ? cudaGetLastError() : cudaErrorInvalidConfiguration;
  }
};

}  // namespace

cudaError_t launch_sm90_forward(const ForwardProblem& problem, const Gpu& gpu) {
  return visit(problem.activation, [&](auto act) {
    using Act = decltype(act);
    if constexpr (!is_tuned(Act::name) || library_has_epilogue(Act::name))
      return cudaErrorNotSupported;
    else
      return problem.dtype == DType::bfloat16 ? Product<cutlass::bfloat16_t, Act>::run(problem, gpu)
                                              : Product<cutlass::half_t, Act>::run(problem, gpu);
  });
}

}  // namespace mlp_ext::cuda
