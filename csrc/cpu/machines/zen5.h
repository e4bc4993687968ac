// AMD EPYC, Zen 5: two cores, 48 KiB of L1d, 1 MiB of L2 per core, AVX-512 in full width and AVX512_BF16.
// Set by `mlp-ext tune` on a quiet machine, where a sweep of shapes agreed; the others are Zen 4's.
#pragma once

#include "cpu/machines/zen4.h"

namespace mlp_ext::cpu {

constexpr Machine kZen5{
    .name = "zen5",
    .bfloat16 = DotMode::bf16_dot,
    .fma =
        {
            .dot_rows_if_deep = kZen4.fma.dot_rows_if_deep,
            .dot_columns = 8,  // 65536x784x10 packed
            .tall_weights = kZen4.fma.tall_weights,
            .few_rows = 16,  // 16x4096x1000 1.7 times packed, 16x784x256 0.95
            .block_bytes = kZen4.fma.block_bytes,
            .panel_rows = 64,
            .panel_columns = 12,
            .elements_per_thread = 1 << 14,
        },
    .converted =
        {
            .dot_rows = 12,
            .dot_rows_if_deep = kZen4.converted.dot_rows_if_deep,
            .dot_depth = 24,
            .dot_columns = 12,
            .few_rows = 16,
            .block_bytes = kZen4.converted.block_bytes,
            .step_rows = 12,
            .elements_per_thread = 1 << 14,
        },
    .bf16_dot =
        {
            .small_dot_depth = 4,
            .dot_rows = 8,
            .dot_rows_if_deep = kZen4.bf16_dot.dot_rows_if_deep,  // 128x4096x256 library
            .dot_depth = 24,
            .dot_columns = 8,
            .tall_inputs = 64,                                              // 1024x128x16 packed
            .library_multiply_adds = kZen4.bf16_dot.library_multiply_adds,  // 100x1000x1000 library
            .library_weights = kZen4.bf16_dot.library_weights,
            .library_inputs = 48,
            .library_outputs = 48,  // 65536x200x50 library
            .library_forward_inputs = kZen4.bf16_dot.library_forward_inputs,
            .block_bytes = kZen4.bf16_dot.block_bytes,
            .step_width = 64,
            .step_rows = 16,
            .elements_per_thread = 1 << 13,
        },
    .amx = kZen4.amx,
};

}  // namespace mlp_ext::cpu
