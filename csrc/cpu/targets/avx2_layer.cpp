#include "cpu/targets/avx2.h"
// After the target.
#include "cpu/kernels-inl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
