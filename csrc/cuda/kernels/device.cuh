// What the kernels need beyond C++: element types, pointers, loads and stores of one or several elements, shared
// memory.
//
// nvcc compiles the kernels for a GPU. Any other compiler runs them on the CPU for tests, where
// tests/cuda_on_cpu/model.h takes the place of CUDA and every access is checked.
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include "model.h"
#endif

#include <cstddef>
#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__) && defined(NDEBUG)  // without it <cassert> declares the same
extern "C" __host__ __device__ void __assert_fail(const char* assertion, const char* file, unsigned line,
                                                  const char* function) noexcept __attribute__((__noreturn__));
#endif

namespace mlp_ext::cuda {

using BFloat16 = __nv_bfloat16;
using Half = __half;

// What a dtype is accumulated in.
template <class S>
using Accumulator = std::conditional_t<sizeof(S) == 2, float, S>;

__host__ __device__ inline float to_accumulator(float v) { return v; }
__host__ __device__ inline double to_accumulator(double v) { return v; }
__host__ __device__ inline float to_accumulator(BFloat16 v) { return __bfloat162float(v); }
__host__ __device__ inline float to_accumulator(Half v) { return __half2float(v); }

template <class S>
__host__ __device__ S from_accumulator(Accumulator<S> v) {
  if constexpr (std::is_same_v<S, BFloat16>)
    return __float2bfloat16(v);
  else if constexpr (std::is_same_v<S, Half>)
    return __float2half(v);
  else
    return v;
}

// V elements that travel together, at most 16 bytes at a time.
template <class S, int V>
struct alignas(V * sizeof(S) < 16 ? V * sizeof(S) : 16) Vector {
  S at[V];
};

#if defined(__CUDACC__)
// As torch's kernels do, which assert also with NDEBUG: the error is "device-side assert triggered".
__device__ inline void device_assert(bool holds, const char* what) {
#if defined(__CUDA_ARCH__)
  if (!holds) __assert_fail(what, __FILE__, __LINE__, "mlp_ext");
#endif
}

template <class T>
using Pointer = T*;

template <int V, class S>
__device__ Vector<std::remove_const_t<S>, V> load(S* p) {
  return *reinterpret_cast<const Vector<std::remove_const_t<S>, V>*>(p);
}
template <int V, class S>
__device__ void store(S* p, const Vector<S, V>& v) {
  *reinterpret_cast<Vector<S, V>*>(p) = v;
}
// V elements from global to shared memory: there after wait_copies() in the same thread.
template <int V, class S>
__device__ void copy_async(S* to, const S* from) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (V * sizeof(S) >= 4) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
                 "l"(__cvta_generic_to_global(from)), "n"(V * sizeof(S))
                 : "memory");
    return;
  }
#endif
  store(to, load<V>(from));
}
__device__ inline void wait_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}
template <class S>
__host__ __device__ bool aligned(const S* p, size_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

// Hands out the block's dynamic shared memory piece by piece; each piece begins at a multiple of 16 bytes.
class SharedMemory {
 public:
  template <class T>
  __device__ T* take(int count) {
    extern __shared__ __align__(16) unsigned char begin[];
    T* const piece = reinterpret_cast<T*>(begin + used_);
    used_ += (count * sizeof(T) + 15) / 16 * 16;
    return piece;
  }

 private:
  size_t used_ = 0;
};
#else
using model::aligned;
using model::Pointer;
using model::SharedMemory;

inline void device_assert(bool holds, const char* what) {
  if (!holds) model::fault(std::string("not ") + what);
}

template <int V, class S>
Vector<std::remove_const_t<S>, V> load(const Pointer<S>& p) {
  Vector<std::remove_const_t<S>, V> v;
  p.read(v.at);
  return v;
}
template <int V, class S>
void store(const Pointer<S>& p, const Vector<S, V>& v) {
  p.write(v.at);
}
template <int V, class S, class From>
void copy_async(const Pointer<S>& to, const From& from) {
  to.forget(V);
  model::copy_later([=] { store(to, load<V>(from)); });
}
inline void wait_copies() { model::copy_now(); }
#endif

// Bytes of a piece of SharedMemory.
template <class T>
constexpr int64_t shared_bytes(int64_t count) {
  return (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
}

}  // namespace mlp_ext::cuda
