// Matrices as the kernels take them.
#pragma once

#include <cstdint>

namespace mlp_ext {

template <class Pointer>
struct MatrixOf {  // rows of unit-stride elements
  Pointer data = nullptr;
  int64_t stride = 0;  // elements from row to row; 0 repeats one row
};
using ConstMatrix = MatrixOf<const void*>;
using Matrix = MatrixOf<void*>;

}  // namespace mlp_ext
