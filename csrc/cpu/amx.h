// A layer in bfloat16 on the tile unit.
#pragma once

#include "cpu/kernels.h"

namespace mlp_ext::cpu {

void forward_by_amx(const Forward& problem, Grid grid, const TileKernels& kernels);
void backward_by_amx(const Backward& problem, const Plan& plan, const TileKernels& kernels, void* memory);
int64_t backward_bytes_by_amx(const Backward& problem);  // of memory

}  // namespace mlp_ext::cpu
