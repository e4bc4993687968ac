#include "cpu/targets/generic.h"
// After the target.
#include "cpu/panels-inl.h"
