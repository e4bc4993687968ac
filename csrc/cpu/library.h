// One layer of bfloat16 around products of torch's own library, which has the processor's matrix unit.
#pragma once

#include "cpu/kernels.h"

namespace mlp_ext::cpu {

void forward_by_library(const Forward& problem, const Kernels& kernels);
void backward_by_library(const Backward& problem, const Kernels& kernels, bool dz_is_dy);

}  // namespace mlp_ext::cpu
