// Tensors to what the kernels take; the device to launch on.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <vector>

#include "cuda/launch.h"
#include "ops/checks.h"

namespace mlp_ext::cuda {

// The tensors' device is the current one; the GEMMs called below have the operands' dtype, whatever autocast says.
struct Guard {
  explicit Guard(const at::Tensor& t) : device(t.device()) {}
  c10::cuda::CUDAGuard device;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::DispatchKey::AutocastCUDA};
};

// [*, columns] as [M, columns] with unit-stride rows; copies only if the strides differ.
inline at::Tensor as_rows(const at::Tensor& t, int64_t M, int64_t columns) {
  return t.dim() == 2 && has_unit_stride(t) ? t : t.contiguous().view({M, columns});
}

inline ConstMatrix matrix(const at::Tensor& t) {
  return t.defined() ? ConstMatrix{t.const_data_ptr(), t.stride(0)} : ConstMatrix();
}

// A workspace. The caching allocator keeps it for this stream.
inline at::Tensor bytes(int64_t size, const at::Tensor& like) {
  return size > 0 ? at::empty({size}, like.options().dtype(at::kByte)) : at::Tensor();
}

inline void* data(const at::Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

// The current one. Queried once: each attribute costs the driver 0.1 us.
inline const Device& device() {
  static const auto all = [] {
    std::vector<Device> found(c10::cuda::device_count());
    for (int i = 0; i < static_cast<int>(found.size()); ++i) {
      const auto attribute = [i](cudaDeviceAttr which) {
        int value = 0;
        C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, i));
        return value;
      };
      found[i] = {10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor),
                  attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
                  attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
    }
    return found;
  }();
  return all[c10::cuda::current_device()];
}

inline Gpu gpu() { return {device(), c10::cuda::getCurrentCUDAStream()}; }

}  // namespace mlp_ext::cuda
