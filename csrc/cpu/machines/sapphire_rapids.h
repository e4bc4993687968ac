// Intel Xeon with AMX: two cores, 48 KiB of L1d, 2 MiB of L2 per core.
#pragma once

#include "cpu/machine.h"

namespace mlp_ext::cpu {

constexpr Machine kSapphireRapids{
    .name = "sapphire_rapids",
    .bfloat16 = DotMode::amx,
    .fma =
        {
            .library_multiply_adds = 1 << 28,  // torch's GEMM runs at 97 % of peak, ours at 89 %: 1024x1024x1024
            .library_forward_inputs = 256,
            .block_bytes = 1 << 20,  // packed B in half of L2: 0.95 of native at 1024x1024x1024, 0.86 with 32
        },
    .converted = {.dot_rows_if_deep = 0, .block_bytes = 1 << 20},
    .bf16_dot = {.dot_rows_if_deep = 32,
                 .library_multiply_adds = 1 << 24,
                 .library_weights = 1 << 20,
                 .block_bytes = 1 << 20,
                 .step_width = 48},
    .amx =
        {
            .dot_rows = 4,
            .dot_rows_if_deep = 4,
            .library_multiply_adds =
                1 << 19,  // 32x784x128 and 16x1024x512: torch's AMX is 2 to 3 times as fast as dots
            .library_forward_inputs = 0,
            .block_bytes = 1 << 20,
            .step_width = 48,
        },
};

}  // namespace mlp_ext::cpu
