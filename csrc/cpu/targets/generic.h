// Kernel target: any processor, with 16-byte vectors that the compiler lowers to the available instructions.
#include "cpu/kernels.h"

#if defined(__x86_64__) && !defined(__clang__)
#pragma GCC optimize("O1")  // x86-64 without AVX2 (before 2013): halves the compile time
#endif
#define MLP_EXT_TARGET generic
#define MLP_EXT_VECTOR_BYTES 16
