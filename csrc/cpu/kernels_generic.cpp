// The kernels for any processor: 16-byte vectors that the compiler lowers to what there is.
#include "cpu/variants.h"

#define MLP_EXT_VECTOR_BYTES 16
#include "cpu/kernels-inl.h"

namespace mlp_ext::cpu {
extern const Variant variant_generic{"generic", kernels, step_kernels, panel_kernels, fma_loop};
}  // namespace mlp_ext::cpu
