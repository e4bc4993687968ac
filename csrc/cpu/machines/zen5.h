// AMD EPYC, Zen 5: two cores, 48 KiB of L1d, 1 MiB of L2 per core, AVX-512 in full width and AVX512_BF16.
// Set by `mlp-ext tune` on a quiet machine, where a sweep of shapes agreed; the others are Zen 4's.
#pragma once

#include "cpu/machines/zen4.h"

namespace mlp_ext::cpu {

constexpr Machine kZen5 = [] {
  Machine m = kZen4;
  m.name = "zen5";

  m.fma.dot_columns = 8;  // 65536x784x10 packed
  m.fma.few_rows = 16;    // 16x4096x1000 1.7 times packed, 16x784x256 0.95
  m.fma.panel_rows = 64;
  m.fma.panel_columns = 12;
  m.fma.elements_per_thread = 1 << 14;

  m.converted.dot_rows = 12;
  m.converted.dot_depth = 24;
  m.converted.dot_columns = 12;
  m.converted.few_rows = 16;
  m.converted.step_rows = 12;
  m.converted.elements_per_thread = 1 << 14;

  m.bf16_dot.small_dot_depth = 4;
  m.bf16_dot.dot_rows = 8;
  m.bf16_dot.dot_depth = 24;
  m.bf16_dot.dot_columns = 8;
  m.bf16_dot.tall_inputs = 64;  // 1024x128x16 packed
  m.bf16_dot.library_inputs = 48;
  m.bf16_dot.library_outputs = 48;  // 65536x200x50 library
  m.bf16_dot.step_width = 64;
  m.bf16_dot.step_rows = 16;
  m.bf16_dot.elements_per_thread = 1 << 13;
  return m;
}();

}  // namespace mlp_ext::cpu
