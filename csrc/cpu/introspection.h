// What module.cpp shows of the CPU backend.
#pragma once

namespace mlp_ext::cpu {

const char* instruction_set();  // "generic", "avx2" or "avx512": what the kernels use in this process

}  // namespace mlp_ext::cpu
