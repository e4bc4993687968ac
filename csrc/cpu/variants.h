// Variants of the kernels, one per instruction set.
#pragma once

#include <atomic>
#include <optional>

#include "cpu/kernels.h"

namespace mlp_ext::cpu {

// Kernels of one instruction set, defined in the namespace of that name by targets/*.cpp.
struct Variant {
  const char* name;
  const LayerKernels& (*layer_kernels)(DType);
  const StepKernels& (*step_kernels)(DType);
  const PanelKernels* (*panel_kernels)(DType);  // nullptr for 16-bit types
  const LaneKernels* (*lane_kernels)(DType);    // nullptr for 16-bit types
  const TileKernels& (*tile_kernels)();         // in plain C++ where there is no AMX
  int64_t (*fma_loop)(int64_t rounds);          // FMAs in registers; returns the number of FLOPs
  int64_t (*tile_loop)(int64_t rounds);         // the same of bfloat16 on tiles; 0 without AMX
};

std::span<const Variant> variants();  // of this build, most capable first

// The most capable variant that torch's own CPU capability allows (ATEN_CPU_CAPABILITY limits it). Throws if none is.
const Variant& variant();

// How a dtype is multiplied here.
DotMode dot_mode_of(DType dtype);

// Overrides dot_mode_of bfloat16 in plans, for tests and measurements.
inline std::atomic<std::optional<DotMode>> forced_dot_mode;

// Peak FLOP/s of this processor, measured in registers: of bfloat16 with AMX by tile_loop, else of float32 by fma_loop.
double peak_flops(double seconds, int64_t threads, DType dtype);

}  // namespace mlp_ext::cpu
