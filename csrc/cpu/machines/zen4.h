// AMD EPYC, Zen 4: two cores, 32 KiB of L1d, 1 MiB of L2 per core, AVX-512 and AVX512_BF16.
#pragma once

#include "cpu/machines/generic.h"

namespace mlp_ext::cpu {

constexpr Machine kZen4{
    .name = "zen4",
    .bfloat16 = DotMode::bf16_dot,
    .fma =
        {
            .dot_rows_if_deep = 64,   // 24x784x256 dots, 32x300x256 packed
            .tiny_depth = 24,         // 65536x16x4 packed, 65536x32x4 dots
            .tall_weights = 1 << 18,  // more gains little: 8192x512x512
            .block_bytes = 2 << 20,   // packed B in L3: half of it packs A twice as often, 5 % slower at 1024x1024x1024
            .panel_rows = 32,         // panels beat layers there: 784-256-10
        },
    .converted = {.dot_rows_if_deep = 0, .block_bytes = 2 << 20},
    .bf16_dot =
        {
            .dot_rows_if_deep = 32,
            .library_multiply_adds = 1 << 24,  // 16384x64x64 library, 2048x64x64 no gain over tall
            .library_weights = 1 << 20,        // 4x1024x1024
            .library_inputs = 24,              // 65536x16x32 tall
            .library_outputs = 16,             // 65536x256x8 tall
            .library_forward_inputs = 1024,    // 128x1024x1024, not 256x512x512
            .block_bytes = 2 << 20,
            .step_width = 48,  // blocks multiply bfloat16 by FMA
        },
    .amx = kGeneric.amx,
};

}  // namespace mlp_ext::cpu
