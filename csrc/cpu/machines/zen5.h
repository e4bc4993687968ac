// AMD EPYC, Zen 5: two cores, 48 KiB of L1d, 1 MiB of L2 per core, AVX-512 in full width and AVX512_BF16.
#pragma once

#include "cpu/machines/zen4.h"

namespace mlp_ext::cpu {

constexpr Machine kZen5{
    .name = "zen5",
    .bfloat16 = DotMode::bf16_dot,
    .fma =
        {
            .dot_rows_if_deep = kZen4.fma.dot_rows_if_deep,
            .tiny_depth = kZen4.fma.tiny_depth,
            .tall_weights = kZen4.fma.tall_weights,
            .few_rows = 16,  // 16x4096x1000 1.7 times packed, 16x784x256 0.95
            .block_bytes = kZen4.fma.block_bytes,
            .panel_rows = kZen4.fma.panel_rows,
        },
    .converted = kZen4.converted,
    .bf16_dot = kZen4.bf16_dot,
    .amx = kZen4.amx,
};

}  // namespace mlp_ext::cpu
