// Which variant runs here, and how fast it could be.
#include "cpu/variants.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <chrono>

#if MLP_EXT_X86
#include <cpuid.h>
#endif

namespace mlp_ext::cpu {

const Variant& variant() {
  static const Variant& chosen = []() -> const Variant& {
#if MLP_EXT_X86
    const auto capability = at::get_cpu_capability();
    if (capability == "AVX512") return variant_avx512;
    if (capability == "AVX2") return variant_avx2;
#endif
    return variant_generic;
  }();
  return chosen;
}

bool multiplies_bfloat16() {
#if MLP_EXT_X86
  static const bool has_it = __builtin_cpu_supports("avx512bf16");
  return has_it;
#else
  return false;
#endif
}

namespace {

bool has_amx_bfloat16() {  // __builtin_cpu_supports does not know it in all compilers
#if MLP_EXT_X86
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 22 & 1);
#else
  return false;
#endif
}

}  // namespace

Products products_of(DType dtype) {
  if (dtype != DType::bfloat16) return Products::single;
  if (forced_products) return *forced_products;
  static const Products here = [] {
    const bool pairs = std::string_view(variant().name) == "avx512" && multiplies_bfloat16();
    return !pairs ? Products::single : has_amx_bfloat16() ? Products::tiles : Products::pairs;
  }();
  return here;
}

bool may_use_library() { return at::Context::hasMKLDNN() && at::globalContext().userEnabledMkldnn(); }

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
