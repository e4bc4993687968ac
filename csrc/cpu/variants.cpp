// Chooses the variant for this processor and measures its peak FLOP/s.
#include "cpu/variants.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <chrono>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
#define MLP_EXT_LIST(target)                                                                                         \
  Variant{#target, target::layer_kernels, target::step_kernels, target::panel_kernels, target::lane_kernels, \
          target::tile_kernels, target::fma_loop, target::tile_loop},
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

bool multiplies_bfloat16() {
#if defined(__x86_64__)
  static const bool has_it = __builtin_cpu_supports("avx512bf16");
  return has_it;
#else
  return false;
#endif
}

bool multiplies_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  static const bool has_them = [] {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    // Not all compilers' __builtin_cpu_supports know AMX. Bits: amx-bf16 and amx-tile.
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx >> 22 & 1) == 0 || (edx >> 24 & 1) == 0) return false;
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, of asm/prctl.h
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return has_them;
#else
  return false;
#endif
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

double peak_flops(double seconds, int64_t threads) {
  const auto fma_loop = variant().fma_loop;
  using Clock = std::chrono::steady_clock;
  std::vector<double> rates(threads);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t operations = 0;
      const auto start = Clock::now();
      double elapsed = 0;
      while (elapsed < seconds) {
        operations += fma_loop(10000);
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
