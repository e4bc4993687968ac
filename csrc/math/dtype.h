// The dtypes of the kernels.
#pragma once

#include <cstdint>

namespace mlp_ext {

enum class DType { float32, float64, bfloat16, float16 };
constexpr const char* kDTypeNames[] = {"float32", "float64", "bfloat16", "float16"};

// Bytes of an element and of its accumulator.
constexpr int64_t item_size(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }
constexpr int64_t accumulator_size(DType dtype) { return dtype == DType::float64 ? 8 : 4; }

}  // namespace mlp_ext
