#include "cpu/targets/avx2.h"
// After the target.
#include "cpu/simd/tile_layer-inl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
