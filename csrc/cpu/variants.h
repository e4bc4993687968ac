// The variants of the kernels, one per instruction set.
#pragma once

#include "cpu/kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define MLP_EXT_X86 1
#else
#define MLP_EXT_X86 0
#endif

namespace mlp_ext::cpu {

const Kernels& kernels_generic(DType dtype, size_t activation);
#if MLP_EXT_X86
const Kernels& kernels_avx2(DType dtype, size_t activation);
const Kernels& kernels_avx512(DType dtype, size_t activation);
#endif

}  // namespace mlp_ext::cpu
