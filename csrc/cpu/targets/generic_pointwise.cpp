#include "cpu/targets/generic.h"
// After the target.
#include "cpu/simd/pointwise-inl.h"
