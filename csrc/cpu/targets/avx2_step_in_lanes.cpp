#include "cpu/targets/avx2.h"
// After the target.
#include "cpu/simd/step_in_lanes-inl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
