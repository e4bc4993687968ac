// A processor that nobody measured: the limits of Zen 4, without what paid off on that machine alone.
#pragma once

#include "cpu/machine.h"

namespace mlp_ext::cpu {

constexpr Machine kGeneric{
    .name = "generic",
    .bfloat16 = DotMode::fma,
    .fma = {},
    .converted = {.dot_rows_if_deep = 0},
    .bf16_dot = {.dot_rows_if_deep = 32,
                 .library_multiply_adds = 1 << 24,
                 .library_weights = 1 << 20,
                 .step_width = 48},
    .amx = {.dot_rows = 4,
            .dot_rows_if_deep = 4,
            .library_multiply_adds = 1 << 19,
            .library_forward_inputs = 0,
            .step_width = 48},
};

}  // namespace mlp_ext::cpu
