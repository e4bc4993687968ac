// A bfloat16 layer on torch's GEMMs, which use the processor's matrix unit.
#pragma once

#include "cpu/kernels.h"

namespace mlp_ext::cpu {

void forward_by_library(const Forward& problem, const LayerKernels& kernels);
void backward_by_library(const Backward& problem, const LayerKernels& kernels);

}  // namespace mlp_ext::cpu
