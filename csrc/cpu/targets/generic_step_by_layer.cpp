#include "cpu/targets/generic.h"
// After the target.
#include "cpu/simd/step_by_layer-inl.h"
