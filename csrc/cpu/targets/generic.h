// The target of the kernels for any processor: 16-byte vectors, which the compiler lowers to what there is.
#include "cpu/kernels.h"

#if defined(__x86_64__) && !defined(__clang__)
#pragma GCC optimize("O1")  // there only processors of before 2013 run this: it compiles in half the time
#endif
#define MLP_EXT_TARGET generic
#define MLP_EXT_VECTOR_BYTES 16
