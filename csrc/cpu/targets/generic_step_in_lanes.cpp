#include "cpu/targets/generic.h"
// After the target.
#include "cpu/simd/step_in_lanes-inl.h"
