// One layer of bfloat16 around GEMMs of torch's own library, which has the processor's matrix unit.
#pragma once

#include "cpu/kernels.h"

namespace mlp_ext::cpu {

void forward_by_library(const Forward& problem, const LayerKernels& kernels);
void backward_by_library(const Backward& problem, const LayerKernels& kernels);

}  // namespace mlp_ext::cpu
