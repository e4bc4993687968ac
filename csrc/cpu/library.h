// A layer on torch's GEMMs.
#pragma once

#include "cpu/kernels.h"

namespace mlp_ext::cpu {

void forward_by_library(const Forward& problem, const LayerKernels& kernels, DType dtype);
void backward_by_library(const Backward& problem, const LayerKernels& kernels, DType dtype);

}  // namespace mlp_ext::cpu
