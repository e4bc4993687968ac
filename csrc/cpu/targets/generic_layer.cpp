#include "cpu/targets/generic.h"
// After the target.
#include "cpu/simd/layer-inl.h"
