// The kernels for x86-64 with AVX2, FMA and F16C.
#include "cpu/variants.h"

#if MLP_EXT_X86
#include <immintrin.h>

// After the shared headers: only what follows may use these instructions.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define MLP_EXT_VECTOR_BYTES 32
#include "cpu/kernels-inl.h"

namespace mlp_ext::cpu {
extern const Variant variant_avx2{"avx2", kernels, step_kernels, panel_kernels, fma_loop};
}  // namespace mlp_ext::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // MLP_EXT_X86
