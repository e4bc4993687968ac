#include "cpu/targets/generic.h"
// After the target.
#include "cpu/simd/tile_layer-inl.h"
