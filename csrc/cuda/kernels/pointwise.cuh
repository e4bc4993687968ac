// The passes around the GEMMs of large layers: each reads and writes every element once, 16 bytes at a time where
// the rows allow it.
#pragma once

#include "cuda/kernels/tile.cuh"
#include "math/losses.h"

namespace mlp_ext::cuda {
namespace pointwise {

constexpr int kThreads = 256;
constexpr int kRowThreads = 8;      // of a block along M, where there are rows for them
constexpr int kRows = 2;            // of a thread at a time: loads under way; with 4, 16-bit types spill registers
constexpr int64_t kMaxParts = 256;  // of the rows: the last block adds as many sums
constexpr int kBlocks = 3;          // of a processor: 80 registers a thread

// The power of two not below n, at most `most`.
__host__ __device__ constexpr int power_of_two(int64_t n, int most) {
  int p = 1;
  while (p < n && p < most) p *= 2;
  return p;
}

// How [M, N] is cut: block (s, p) has the columns of strip s and the rows of part p.
struct Grid {
  int64_t M, N;
  int vector;        // elements of a column thread
  int across, down;  // threads along N and M
  __host__ __device__ Grid(int64_t M_, int64_t N_, int vector_) : M(M_), N(N_), vector(vector_), across(0), down(0) {
    const int wanted = power_of_two(M, kRowThreads);
    across = power_of_two(ceil_div(N, vector), kThreads / wanted);
    down = kThreads / across;
  }
  __host__ __device__ int width() const { return across * vector; }
  int64_t strips() const { return ceil_div(N, width()); }
  int64_t parts(const Device& device) const {
    const int64_t wanted = device.processors * kBlocks / strips(), most = ceil_div(M, down * kRows);
    return std::max<int64_t>(1, std::min({wanted, most, kMaxParts}));
  }
};

// sum of the threads of a column, in those with down == 0; always in the same order. sums: [down, width].
template <int V, class T>
__device__ void add_rows(const Grid& grid, const Pointer<T>& sums, T (&sum)[V], int across, int down) {
#pragma unroll
  for (int v = 0; v < V; ++v) sums[(down * V + v) * grid.across + across] = sum[v];
  for (int half = grid.down / 2; half > 0; half /= 2) {
    __syncthreads();
    if (down < half)
#pragma unroll
      for (int v = 0; v < V; ++v) {
        sum[v] += sums[((down + half) * V + v) * grid.across + across];
        sums[(down * V + v) * grid.across + across] = sum[v];
      }
  }
}

// Whether this is the last of so many blocks to come here; it sees what the others wrote before. By all threads.
__device__ inline bool is_last(const Pointer<unsigned>& finished, unsigned blocks) {
  // A fence is cumulative: those of thread 0 hold for all that the barriers order before and after it.
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(finished, blocks - 1) == blocks - 1;  // wraps to 0
    __threadfence();
  }
  return __syncthreads_or(last);
}

}  // namespace pointwise

// y = act(z + b)
template <class S>
struct BiasAct {
  int64_t M, N;
  Rows<const S> z;        // [M, N]
  Pointer<const S> bias;  // [N] or nullptr
  Rows<S> y;              // [M, N], may be z
};

// The V of bias_act<S, Act, V>.
template <class S>
int bias_act_vector(const BiasAct<S>& f) {
  return in_vectors(f.z, f.N) && in_vectors(f.y, f.N) && aligned(f.bias, 16) ? kVector<S> : 1;
}

template <class S>
Launch bias_act_launch(const BiasAct<S>& f, const Device& device) {
  if (f.M == 0 || f.N == 0) return {};
  const pointwise::Grid grid(f.M, f.N, bias_act_vector(f));
  return {grid.strips(), grid.parts(device), pointwise::kThreads, 0};
}

template <class S, class Act, int V>
__global__ void __launch_bounds__(pointwise::kThreads, pointwise::kBlocks) bias_act(const BiasAct<S> f, const Act act) {
  using T = Accumulator<S>;
  using pointwise::kRows;
  const pointwise::Grid grid(f.M, f.N, V);
  const int64_t column = blockIdx.x * int64_t{grid.width()} + threadIdx.x % grid.across * V;
  if (column >= f.N) return;
  T bias[V] = {};
  if (f.bias) {
    const auto raw = load<V>(f.bias + column);
#pragma unroll
    for (int v = 0; v < V; ++v) bias[v] = to_accumulator(raw.at[v]);
  }
  const int64_t step = gridDim.y * int64_t{grid.down};
  for (int64_t m = blockIdx.y * int64_t{grid.down} + threadIdx.x / grid.across; m < f.M; m += kRows * step) {
    Vector<S, V> z[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (m + r * step < f.M) z[r] = load<V>(f.z.at(m + r * step, column));
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (m + r * step >= f.M) break;
      with_functor(act, [&](const auto& act) {
#pragma unroll
        for (int v = 0; v < V; ++v) z[r].at[v] = from_accumulator<S>(act.forward(to_accumulator(z[r].at[v]) + bias[v]));
      });
      store(f.y.at(m + r * step, column), z[r]);
    }
  }
}

// dz = act'(dy, saved);  db = sum over rows of dz
template <class S>
struct GradZProblem {
  int64_t M, N;
  Rows<const S> dy, saved;       // [M, N]; saved is y, z or nullptr
  Rows<S> dz;                    // [M, N] or nullptr
  Pointer<S> db;                 // [N] or nullptr; the rest is for db alone
  Pointer<Accumulator<S>> sums;  // [parts = blocks_y of the launch, N]
  Pointer<unsigned> finished;    // [strips = blocks_x of the launch], 0 before the launch and after it
};

// The V of grad_z<S, Act, V>.
template <class S>
int grad_z_vector(const GradZProblem<S>& g) {
  return in_vectors(g.dy, g.N) && in_vectors(g.saved, g.N) && in_vectors(g.dz, g.N) ? kVector<S> : 1;
}

template <class S>
Launch grad_z_launch(const GradZProblem<S>& g, const Device& device) {
  if (g.N == 0) return {};
  const pointwise::Grid grid(g.M, g.N, grad_z_vector(g));
  const int64_t shared = g.db ? shared_bytes<Accumulator<S>>(grid.down * grid.width()) : 0;
  return {grid.strips(), grid.parts(device), pointwise::kThreads, shared};
}

template <class S, class Act, int V>
__global__ void __launch_bounds__(pointwise::kThreads, pointwise::kBlocks)
    grad_z(const GradZProblem<S> g, const Act act) {
  using T = Accumulator<S>;
  using pointwise::kRows;
  using Source = GradZ<S, Act>;
  const pointwise::Grid grid(g.M, g.N, V);
  const int across = threadIdx.x % grid.across, down = threadIdx.x / grid.across;
  const int64_t column = blockIdx.x * int64_t{grid.width()} + across * V;
  const int64_t rows_end = column < g.N ? g.M : 0;
  const int64_t step = gridDim.y * int64_t{grid.down};
  const Source source{g.dy, g.saved, act};
  T sum[V] = {};
  for (int64_t m = blockIdx.y * int64_t{grid.down} + down; m < rows_end; m += kRows * step) {
    typename Source::template Raw<V> raw[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (m + r * step < rows_end) raw[r] = source.template fetch<V>(m + r * step, column);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (m + r * step >= rows_end) break;
      Vector<S, V> dz;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const T value = source.template value<V>(raw[r], v);
        sum[v] += value;
        dz.at[v] = from_accumulator<S>(value);
      }
      if (g.dz.data) store(g.dz.at(m + r * step, column), dz);
    }
  }
  if (!g.db) return;

  // First the sums of the block, then, in the last block of the strip, those of all its parts.
  SharedMemory shared;
  const auto sums = shared.take<T>(grid.down * grid.width());  // [down, width]
  pointwise::add_rows<V>(grid, sums, sum, across, down);
  if (down == 0 && column < g.N)
#pragma unroll
    for (int v = 0; v < V; ++v) g.sums[blockIdx.y * g.N + column + v] = sum[v];
  if (!pointwise::is_last(g.finished + blockIdx.x, gridDim.y)) return;
#pragma unroll
  for (int v = 0; v < V; ++v) sum[v] = 0;
  if (column < g.N)
    for (int64_t part = down; part < gridDim.y; part += grid.down)
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += g.sums[part * g.N + column + v];
  pointwise::add_rows<V>(grid, sums, sum, across, down);
  if (down == 0 && column < g.N)
#pragma unroll
    for (int v = 0; v < V; ++v) g.db[column + v] = from_accumulator<S>(sum[v]);
}

// dy = L'(y, t) scale;  loss = scale times the sum of L(y, t) over all elements
template <class S>
struct ElementLoss {
  LossFunction function;  // of elements
  int64_t M, N;
  Rows<const S> y, target;  // [M, N]
  Pointer<const S> weight;  // [N] or nullptr
  Rows<S> dy;               // [M, N]
  Accumulator<S> scale;
  Pointer<S> loss;               // []
  Pointer<Accumulator<S>> sums;  // [blocks of the launch]
  Pointer<unsigned> finished;    // [], 0 before the launch and after it
};

// The V of element_loss<S, V>.
template <class S>
int element_loss_vector(const ElementLoss<S>& f) {
  const bool rows_fit = in_vectors(f.y, f.N) && in_vectors(f.target, f.N) && in_vectors(f.dy, f.N);
  return rows_fit && aligned(f.weight, 16) ? kVector<S> : 1;
}

template <class S>
Launch element_loss_launch(const ElementLoss<S>& f, const Device& device) {
  if (f.M == 0 || f.N == 0) return {};
  const pointwise::Grid grid(f.M, f.N, element_loss_vector(f));
  return {grid.strips(), grid.parts(device), pointwise::kThreads, shared_bytes<Accumulator<S>>(pointwise::kThreads)};
}

namespace pointwise {

// dy of this thread's elements; returns the sum of their losses, not scaled.
template <int V, class S, class Loss, class T = Accumulator<S>>
__device__ T add_losses(const ElementLoss<S>& f, const Loss& loss) {
  const Grid grid(f.M, f.N, V);
  const int64_t column = blockIdx.x * int64_t{grid.width()} + threadIdx.x % grid.across * V;
  if (column >= f.N) return 0;
  T sum = 0, weight[V];
#pragma unroll
  for (int v = 0; v < V; ++v) weight[v] = 1;
  if (f.weight) {
    const auto raw = load<V>(f.weight + column);
#pragma unroll
    for (int v = 0; v < V; ++v) weight[v] = to_accumulator(raw.at[v]);
  }
  const int64_t step = gridDim.y * int64_t{grid.down};
  for (int64_t m = blockIdx.y * int64_t{grid.down} + threadIdx.x / grid.across; m < f.M; m += step) {
    const auto outputs = load<V>(f.y.at(m, column)), targets = load<V>(f.target.at(m, column));
    Vector<S, V> dy;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const T y = to_accumulator(outputs.at[v]), t = to_accumulator(targets.at[v]);
      if constexpr (is_of_probabilities<Loss>) device_assert(0 <= y && y <= 1 && 0 <= t && t <= 1, "a probability");
      sum += loss.forward(y, t, weight[v]);
      dy.at[v] = from_accumulator<S>(loss.backward(y, t, weight[v], f.scale));
    }
    store(f.dy.at(m, column), dy);
  }
  return sum;
}

}  // namespace pointwise

template <class S, int V>
__global__ void __launch_bounds__(pointwise::kThreads, pointwise::kBlocks) element_loss(const ElementLoss<S> f) {
  using T = Accumulator<S>;
  T sum[1] = {visit(f.function, [&](const auto& loss) -> T {
    if constexpr (is_of_rows<std::remove_cvref_t<decltype(loss)>>)
      return 0;
    else
      return pointwise::add_losses<V>(f, loss);
  })};

  SharedMemory shared;
  const auto sums = shared.take<T>(pointwise::kThreads);
  const pointwise::Grid one_column(f.M, 1, 1);
  const unsigned blocks = gridDim.x * gridDim.y;
  pointwise::add_rows<1>(one_column, sums, sum, 0, threadIdx.x);
  if (threadIdx.x == 0) f.sums[blockIdx.y * gridDim.x + blockIdx.x] = sum[0];
  if (!pointwise::is_last(f.finished, blocks)) return;
  sum[0] = 0;
  for (unsigned b = threadIdx.x; b < blocks; b += pointwise::kThreads) sum[0] += f.sums[b];
  pointwise::add_rows<1>(one_column, sums, sum, 0, threadIdx.x);
  if (threadIdx.x == 0) *f.loss = from_accumulator<S>(sum[0] * f.scale);
}

}  // namespace mlp_ext::cuda
