// Which variant runs here, and how fast it could be.
#include "cpu/variants.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <chrono>

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
