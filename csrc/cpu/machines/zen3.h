// AMD EPYC, Zen 3: two cores, 32 KiB of L1d, 512 KiB of L2 per core, AVX2.
// Set by `mlp-ext tune` where it was clear, on a machine that was not quite quiet; the others are Zen 4's.
#pragma once

#include "cpu/machines/zen4.h"

namespace mlp_ext::cpu {

constexpr Machine kZen3 = [] {
  Machine m = kZen4;
  m.name = "zen3";
  m.bfloat16 = DotMode::fma;

  m.fma.dot_rows = 8;               // 16x128x128 and 16x1024x512 packed
  m.fma.dot_rows_if_deep = 0;       // 32x784x128 packed
  m.fma.in_place_outputs = kNever;  // 4096x784x10 to 1024x1024x1024 in place
  m.fma.streamed_depth = 128;       // 65536x64x64 streamed, 16384x256x256 not
  m.fma.row_lane_bytes = 32;        // a vector: 10-5-1 at 8 rows
  m.fma.panel_rows_per_empty_lane = 5;
  m.fma.panel_columns = 12;
  m.fma.elements_per_thread = 1 << 14;

  m.converted.dot_rows = 1;
  m.converted.few_rows = 16;
  m.converted.step_rows = 8;
  return m;
}();

}  // namespace mlp_ext::cpu
