// The kernels for any processor: 16-byte vectors that the compiler lowers to what there is.
#include "cpu/variants.h"

#define MLP_EXT_VECTOR_BYTES 16
#include "cpu/kernels-inl.h"

namespace mlp_ext::cpu {
const Kernels& kernels_generic(DType dtype, size_t activation) {
  return kTable[static_cast<size_t>(dtype)][activation];
}
}  // namespace mlp_ext::cpu
