#include "cpu/targets/generic.h"
// After the target.
#include "cpu/step-inl.h"
