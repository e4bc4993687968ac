// The variants of the kernels, one per instruction set.
#pragma once

#include <atomic>
#include <optional>

#include "cpu/kernels.h"

namespace mlp_ext::cpu {

// One instruction set's kernels: the namespace of that name, which targets/*.cpp fill.
struct Variant {
  const char* name;
  const LayerKernels& (*layer_kernels)(DType);
  const StepKernels& (*step_kernels)(DType);
  const PanelKernels* (*panel_kernels)(DType);  // nullptr where there are none
  int64_t (*fma_loop)(int64_t rounds);          // multiplies and adds in registers; returns how many operations it did
};

std::span<const Variant> variants();  // that were built, the most capable first

// The most capable that torch chooses too, which the environment variable ATEN_CPU_CAPABILITY bounds. Throws if none
// is.
const Variant& variant();

// How a dtype is multiplied here.
DotMode dot_mode_of(DType dtype);
bool may_use_library();  // torch's products: without oneDNN those of bfloat16 are slow

// Instead of what the processor has, for the plan alone: to measure what it should say, and to test it.
inline std::atomic<std::optional<DotMode>> forced_dot_mode;

// What the processor can do at most in float32, operations per second: fma_loop on so many threads for some time.
double peak_flops(double seconds, int64_t threads);

}  // namespace mlp_ext::cpu
