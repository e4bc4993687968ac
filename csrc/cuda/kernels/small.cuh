// Latency-bound layers: one launch forward, one backward.
//
// A block makes a tile of 16 x 16 results over the whole depth. Its threads share the depth rather than the results, so
// that even a layer of one tile keeps many loads in flight. The depth fits an int.
#pragma once

#include "cuda/kernels/tile.cuh"

namespace mlp_ext::cuda {
namespace small {

constexpr int kThreads = 256;
constexpr int kEdge = 16;  // of a tile of results
// In shared memory at a time. Backward fetches dy and saved, which takes more registers.
constexpr int kForwardDepth = 128, kBackwardDepth = 64;
constexpr int kPart = 4;                                    // edge of the results of one thread
constexpr int kAcross = kEdge / kPart;                      // threads along an edge
constexpr int kSlices = kThreads / (kAcross * kAcross);     // of the depth
constexpr int kSliceStride = kThreads + kAcross * kAcross;  // of their sums: no bank twice in a warp
static_assert(kEdge * kEdge == kThreads);                   // in the end a thread has one result
template <class S>
constexpr int kBlocks = sizeof(S) == 8 ? 1 : 2;  // of a processor: as many as registers allow

__host__ __device__ constexpr int64_t tiles(int64_t size) { return ceil_div(size, kEdge); }

template <int kDepth>
constexpr int kTile = kEdge * row_stride(kDepth);

template <class T, int kDepth>
constexpr int64_t shared() {
  return std::max(2 * shared_bytes<T>(kTile<kDepth>), shared_bytes<T>(kSlices * kSliceStride));
}

// The rows from `first` on of an operand, 16 at most, which lies [row, depth] in memory where kAlong, else [depth,
// row].
template <class T, int kDepth_, bool kAlong, class Source>
struct Operand {
  Source source;
  int64_t first;
  int rows, depth;
  using Raw = typename Source::template Raw<1>;
  static constexpr int kDepth = kDepth_, kElements = kEdge * kDepth / kThreads;  // elements that a thread fetches
  static constexpr int kStride = kAlong ? row_stride(kDepth) : kEdge;

  __device__ Operand(const Source& source, int64_t first, int64_t rows, int64_t depth)
      : source(source),
        first(first),
        rows(static_cast<int>(smaller(kEdge, rows - first))),
        depth(static_cast<int>(depth)) {}

  // f(i, row, k) for the elements of this thread, neighbours in memory to neighbouring threads.
  template <class F>
  __device__ static void for_elements(const F& f) {
    const int t = threadIdx.x;
#pragma unroll
    for (int i = 0; i < kElements; ++i)
      if constexpr (kAlong)
        f(i, t / kDepth + i * (kThreads / kDepth), t % kDepth);
      else
        f(i, t % kEdge, t / kEdge + i * (kThreads / kEdge));
  }
  __device__ void fetch(int k0, Raw (&raw)[kElements]) const {
    for_elements([&](int i, int row, int k) {
      if (row >= rows || k0 + k >= depth) return;
      const int64_t r = first + row, d = k0 + k;
      raw[i] = kAlong ? source.template fetch<1>(r, d) : source.template fetch<1>(d, r);
    });
  }
  __device__ void put(int k0, const Raw (&raw)[kElements], const Pointer<T>& tile) const {
    for_elements([&](int i, int row, int k) {
      const bool inside = row < rows && k0 + k < depth;
      tile[kAlong ? row * kStride + k : k * kStride + row] = inside ? source.template value<1>(raw[i], 0) : T(0);
    });
  }
  // What thread t of those along an edge reads, and where its i-th result lies.
  __device__ static auto part(const Pointer<T>& tile, int t) {
    if constexpr (kAlong)
      return AlongDepth<T>{tile + t * kStride, kStride, kAcross};
    else
      return AcrossDepth<T>{tile + t * kPart, kStride, kEdge};
  }
  __device__ static int result(int t, int i) { return kAlong ? t + i * kAcross : t * kPart + i; }
};

// finish(row, column, sum) for the results of a tile, sum = a[row] . b[column] over the depth.
template <class T, class A, class B, class Finish>
__device__ void product(const A& a, const B& b, const Finish& finish) {
  SharedMemory operands;
  constexpr int kDepth = A::kDepth;
  const auto a_tile = operands.take<T>(kTile<kDepth>), b_tile = operands.take<T>(kTile<kDepth>);
  const int t = threadIdx.x, across_b = t % kAcross, across_a = t / kAcross % kAcross, slice = t / (kAcross * kAcross);
  const auto a_part = A::part(a_tile, across_a);
  const auto b_part = B::part(b_tile, across_b);
  T sum[kPart][kPart] = {};
  typename A::Raw a_raw[A::kElements];
  typename B::Raw b_raw[B::kElements];
  a.fetch(0, a_raw);
  b.fetch(0, b_raw);
  for (int k0 = 0; k0 < a.depth; k0 += kDepth) {
    a.put(k0, a_raw, a_tile);
    b.put(k0, b_raw, b_tile);
    __syncthreads();
    a.fetch(k0 + kDepth, a_raw);  // on their way during the product
    b.fetch(k0 + kDepth, b_raw);
    for (int k = slice * kStep; k < kDepth && k0 + k < a.depth; k += kSlices * kStep)
      add_product(sum, a_part, b_part, k);
    __syncthreads();
  }

  SharedMemory slices;                                       // in the place of the operands
  const auto sums = slices.take<T>(kSlices * kSliceStride);  // [slice, i, j, across_a, across_b]
#pragma unroll
  for (int i = 0; i < kPart; ++i)
#pragma unroll
    for (int j = 0; j < kPart; ++j)
      sums[slice * kSliceStride + ((i * kPart + j) * kAcross + across_a) * kAcross + across_b] = sum[i][j];
  __syncthreads();
  T total = 0;
#pragma unroll
  for (int s = 0; s < kSlices; ++s) total += sums[s * kSliceStride + t];
  // The result of place t, so that reading meets in no bank either.
  const int row = A::result(across_a, slice / kPart), column = B::result(across_b, slice % kPart);
  if (row < a.rows && column < b.rows) finish(a.first + row, b.first + column, total);
}

}  // namespace small

template <class S>
Launch small_forward_launch(const Forward<S>& f) {
  return {small::tiles(f.M) * small::tiles(f.N), 1, small::kThreads,
          small::shared<Accumulator<S>, small::kForwardDepth>()};
}

// y = act(x W^T + b)   (M,K)(K,N)
template <class S, class Act>
__global__ void __launch_bounds__(small::kThreads, small::kBlocks<S>) small_forward(const Forward<S> f, const Act act) {
  using T = Accumulator<S>;
  const int64_t columns = small::tiles(f.N), m = blockIdx.x / columns * small::kEdge,
                n = blockIdx.x % columns * small::kEdge;
  const small::Operand<T, small::kForwardDepth, true, Plain<S>> x({f.x}, m, f.M, f.K), w({f.w}, n, f.N, f.K);
  small::product<T>(x, w, [&](int64_t m, int64_t n, T z) {
    if (f.bias) z += to_accumulator(f.bias[n]);
    if constexpr (kStoresZ<Act>)
      if (f.z.data) *f.z.at(m, n) = from_accumulator<S>(z);
    *f.y.at(m, n) = from_accumulator<S>(act.forward(z));
  });
}

namespace small {

// The blocks of the backward kernel: tiles of dx, then tiles of dW with db as its column K.
struct BackwardGrid {
  int64_t dx_columns, dx_tiles, dw_first, dw_columns, dw_tiles;
  template <class S>
  __host__ __device__ explicit BackwardGrid(const Backward<S>& b)
      : dx_columns(tiles(b.K)),
        dx_tiles(b.dx.data ? tiles(b.M) * dx_columns : 0),
        dw_first(b.dw ? 0 : b.K / kEdge),
        dw_columns(tiles(b.K + (b.db ? 1 : 0)) - dw_first),
        dw_tiles(b.dw || b.db ? tiles(b.N) * dw_columns : 0) {}
};

}  // namespace small

template <class S>
Launch small_backward_launch(const Backward<S>& b) {
  const small::BackwardGrid grid(b);
  return {grid.dx_tiles + grid.dw_tiles, 1, small::kThreads, small::shared<Accumulator<S>, small::kBackwardDepth>()};
}

// dz = act'(dy, saved);  dx = dz W   (M,N)(N,K);  dW = dz^T x   (N,M)(M,K);  db = sum over rows of dz
template <class S, class Act>
__global__ void __launch_bounds__(small::kThreads, small::kBlocks<S>)
    small_backward(const Backward<S> b, const Act act) {
  using T = Accumulator<S>;
  using small::kEdge;
  constexpr int kDepth = small::kBackwardDepth;
  const small::BackwardGrid grid(b);
  const GradZ<S, Act> dz{b.dy, b.saved, act};
  int64_t tile = blockIdx.x;
  if (tile < grid.dx_tiles) {
    const int64_t m = tile / grid.dx_columns * kEdge, k = tile % grid.dx_columns * kEdge;
    const small::Operand<T, kDepth, true, GradZ<S, Act>> rows(dz, m, b.M, b.N);
    const small::Operand<T, kDepth, false, Plain<S>> w({b.w}, k, b.K, b.N);
    small::product<T>(rows, w, [&](int64_t m, int64_t k, T sum) { *b.dx.at(m, k) = from_accumulator<S>(sum); });
  } else {
    tile -= grid.dx_tiles;
    const int64_t n = tile / grid.dw_columns * kEdge, k = (tile % grid.dw_columns + grid.dw_first) * kEdge;
    const small::Operand<T, kDepth, false, GradZ<S, Act>> columns(dz, n, b.N, b.M);
    const small::Operand<T, kDepth, false, WithOnes<S>> x({b.x, b.dw ? b.K : 0}, k, b.K + (b.db ? 1 : 0), b.M);
    small::product<T>(columns, x, [&](int64_t n, int64_t k, T sum) {
      if (k == b.K)
        b.db[n] = from_accumulator<S>(sum);
      else if (b.dw)
        b.dw[n * b.K + k] = from_accumulator<S>(sum);
    });
  }
}

}  // namespace mlp_ext::cuda
