// The kernels for x86-64 with AVX-512 F, BW, VL and DQ.
#include "cpu/variants.h"

#if MLP_EXT_X86
#include <immintrin.h>

// After the shared headers: only what follows may use these instructions. Those of BF16 are called by name alone, where
// the processor has them.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")
#endif

#define MLP_EXT_VECTOR_BYTES 64
#include "cpu/kernels-inl.h"

namespace mlp_ext::cpu {
extern const Variant variant_avx512{"avx512", kernels, step_kernels, panel_kernels, fma_loop};
}  // namespace mlp_ext::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // MLP_EXT_X86
