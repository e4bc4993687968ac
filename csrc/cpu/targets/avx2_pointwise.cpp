#include "cpu/targets/avx2.h"
// After the target.
#include "cpu/simd/pointwise-inl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
