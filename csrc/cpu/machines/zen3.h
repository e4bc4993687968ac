// AMD EPYC, Zen 3: two cores, 32 KiB of L1d, 512 KiB of L2 per core, AVX2.
// Set by `mlp-ext tune` where it was clear, on a machine that was not quite quiet; the others are Zen 4's.
#pragma once

#include "cpu/machines/zen4.h"

namespace mlp_ext::cpu {

constexpr Machine kZen3{
    .name = "zen3",
    .bfloat16 = DotMode::fma,
    .fma =
        {
            .dot_rows = 8,          // 16x128x128 and 16x1024x512 packed
            .dot_rows_if_deep = 0,  // 32x784x128 packed
            .tall_weights = kZen4.fma.tall_weights,
            .in_place_outputs = kNever,  // 4096x784xN and 1024x1024x1024 in place; tiles have 6 rows
            .block_bytes = kZen4.fma.block_bytes,
            .streamed_depth = 128,  // 65536x64x64 streamed, 16384x256x256 not
            .row_lane_bytes = 32,   // a vector: 10-5-1 at 8 rows
            .panel_rows = kZen4.fma.panel_rows,
            .panel_rows_per_empty_lane = 5,
            .panel_columns = 12,
            .elements_per_thread = 1 << 14,
        },
    .converted =
        {
            .dot_rows = 1,
            .dot_rows_if_deep = kZen4.converted.dot_rows_if_deep,
            .few_rows = 16,
            .block_bytes = kZen4.converted.block_bytes,
            .step_rows = 8,
        },
    .bf16_dot = kZen4.bf16_dot,
    .amx = kZen4.amx,
};

}  // namespace mlp_ext::cpu
