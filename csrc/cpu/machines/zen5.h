// AMD EPYC, Zen 5: two cores, 48 KiB of L1d, 1 MiB of L2 per core, AVX-512 in full width and AVX512_BF16.
#pragma once

#include "cpu/machines/zen4.h"

namespace mlp_ext::cpu {

constexpr Machine kZen5{
    .name = "zen5",
    .bfloat16 = DotMode::bf16_dot,
    .fma = kZen4.fma,
    .converted = kZen4.converted,
    .bf16_dot = kZen4.bf16_dot,
    .amx = kZen4.amx,
};

}  // namespace mlp_ext::cpu
