#include "cpu/targets/generic.h"
// After the target.
#include "cpu/kernels-inl.h"
