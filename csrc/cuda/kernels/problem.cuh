// What the kernels compute, and how they are launched.
#pragma once

#include <algorithm>

#include "cuda/kernels/device.cuh"
#include "cuda/plan.h"
#include "math/activations.h"

namespace mlp_ext::cuda {

template <class S>
struct Rows {  // a matrix: rows of unit-stride elements
  Pointer<S> data = nullptr;
  int64_t stride = 0;  // elements from row to row; 0 repeats one row
  __host__ __device__ Pointer<S> at(int64_t i, int64_t j) const { return data + (i * stride + j); }
};

// y = act(x W^T + b)
template <class S>
struct Forward {
  int64_t M, K, N;
  Rows<const S> x;        // [M, K]
  Rows<const S> w;        // [N, K]
  Pointer<const S> bias;  // [N] or nullptr
  Rows<S> y;              // [M, N]
  Rows<S> z;              // [M, N] or nullptr: x W^T + b
};

// dz = act'(dy, saved);  dx = dz W;  dW = dz^T x;  db = sum over rows of dz
template <class S>
struct Backward {
  int64_t M, K, N;
  Rows<const S> dy, saved;  // [M, N]; saved is y, z or nullptr
  Rows<const S> x;          // [M, K], for dW
  Rows<const S> w;          // [N, K], for dx
  Rows<S> dx;               // [M, K] or nullptr
  Pointer<S> dw;            // [N, K] or nullptr, contiguous
  Pointer<S> db;            // [N] or nullptr
};

// Kernels are templates of the activation. Of AnyActivation only the run time tells what its backward needs.
template <class Act>
constexpr bool kIsAny = std::is_same_v<Act, AnyActivation>;

// f(functor); of AnyActivation the one that was chosen, so that the choice is made outside of the loops of f.
template <class Act, class F>
__device__ void with_functor(const Act& act, const F& f) {
  if constexpr (kIsAny<Act>)
    visit(act.chosen, f);
  else
    f(act);
}
// Whether forward has the code that stores z.
template <class Act>
constexpr bool kStoresZ = [] {
  if constexpr (kIsAny<Act>)
    return true;
  else
    return Act{}.needs() == Needs::preactivation;
}();
// Whether backward reads `saved`.
template <class Act, class S>
__device__ bool reads_saved(const Act& act, const Rows<const S>& saved) {
  if constexpr (kIsAny<Act>)
    return static_cast<bool>(saved.data);
  else
    return act.needs() != Needs::nothing;
}

// Blocks, threads of a block, bytes of dynamic shared memory. No blocks: nothing to launch.
struct Launch {
  int64_t blocks_x = 0, blocks_y = 1;
  int threads = 0;
  int64_t shared = 0;
  int64_t blocks() const { return blocks_x * blocks_y; }
};

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
__host__ __device__ constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Elements in 16 bytes.
template <class S>
constexpr int kVector = 16 / sizeof(S);

// Whether rows of that many columns may be read and written 16 bytes at a time.
template <class S>
__host__ __device__ bool in_vectors(const Rows<S>& m, int64_t columns) {
  return aligned(m.data, 16) && m.stride % kVector<S> == 0 && columns % kVector<S> == 0;
}

}  // namespace mlp_ext::cuda
