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
const Kernels& kernels_avx2(DType dtype, size_t activation) { return kTable[static_cast<size_t>(dtype)][activation]; }
}  // namespace mlp_ext::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // MLP_EXT_X86
