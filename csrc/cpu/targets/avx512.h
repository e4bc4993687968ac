// Kernel target: x86-64 with AVX-512 F, BW, VL and DQ. AVX512_BF16 is used if the processor has it.
#include <immintrin.h>
#include "cpu/kernels.h"

// After the shared headers: only what follows may use these instructions.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")
#endif

#define MLP_EXT_TARGET avx512
#define MLP_EXT_VECTOR_BYTES 64
