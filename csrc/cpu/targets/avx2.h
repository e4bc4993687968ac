// Kernel target: x86-64 with AVX2, FMA and F16C.
#include <immintrin.h>
#include "cpu/kernels.h"

// After the shared headers: only what follows may use these instructions.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define MLP_EXT_TARGET avx2
#define MLP_EXT_VECTOR_BYTES 32
