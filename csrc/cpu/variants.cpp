// Chooses the variant for this processor and measures its peak FLOP/s.
#include "cpu/variants.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <chrono>

namespace mlp_ext::cpu {

// setup.py defines MLP_EXT_TARGETS(DO) as DO(avx512) DO(avx2) DO(generic), or a subset.
#define MLP_EXT_DECLARE(target)             \
  namespace target {                        \
  const LayerKernels& layer_kernels(DType); \
  const StepKernels& step_kernels(DType);   \
  const PanelKernels* panel_kernels(DType); \
  const LaneKernels* lane_kernels(DType);   \
  const TileKernels& tile_kernels();        \
  int64_t fma_loop(int64_t rounds);         \
  int64_t tile_loop(int64_t rounds);        \
  }
#define MLP_EXT_LIST(target)     \
  Variant{#target,               \
          target::layer_kernels, \
          target::step_kernels,  \
          target::panel_kernels, \
          target::lane_kernels,  \
          target::tile_kernels,  \
          target::fma_loop,      \
          target::tile_loop},
MLP_EXT_TARGETS(MLP_EXT_DECLARE)

std::span<const Variant> variants() {
  static constexpr Variant all[]{MLP_EXT_TARGETS(MLP_EXT_LIST)};
  return all;
}

const Variant& variant() {
  static const Variant& chosen = []() -> const Variant& {
    const std::string capability = at::get_cpu_capability();  // DEFAULT, AVX2, AVX512, or another processor's
    for (const Variant& v : variants()) {
      const std::string_view name = v.name;
      if (name == "generic" || capability == "AVX512" || (name == "avx2" && capability == "AVX2")) return v;
    }
    TORCH_CHECK(false, "mlp_ext was built for ", variants().back().name,
                " alone (MLP_EXT_ISA=native), which this processor does not have or ATEN_CPU_CAPABILITY forbids; "
                "build it here, without MLP_EXT_ISA");
  }();
  return chosen;
}

DotMode dot_mode_of(DType dtype) {
  if (dtype != DType::bfloat16) return DotMode::fma;
  if (const auto forced = forced_dot_mode.load()) return *forced;
  static const DotMode here = [] {
    const bool pairs = std::string_view(variant().name) == "avx512" && multiplies_bfloat16();
    return !pairs ? DotMode::fma : multiplies_tiles() ? DotMode::amx : DotMode::bf16_dot;
  }();
  return here;
}

double peak_flops(double seconds, int64_t threads, DType dtype) {
  const auto loop = dot_mode_of(dtype) == DotMode::amx ? variant().tile_loop : variant().fma_loop;
  using Clock = std::chrono::steady_clock;
  std::vector<double> rates(threads);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t operations = 0;
      const auto start = Clock::now();
      double elapsed = 0;
      while (elapsed < seconds) {
        operations += loop(10000);
        elapsed = std::chrono::duration<double>(Clock::now() - start).count();
      }
      rates[i] = operations / elapsed;
    }
  });
  double total = 0;
  for (const double rate : rates) total += rate;
  return total;
}

}  // namespace mlp_ext::cpu
