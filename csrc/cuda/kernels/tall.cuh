// Narrow layers of many rows: W stays in shared memory, each row is read once and written once.
//
// As many blocks as fit on the GPU loop over row tiles. While a tile is computed, cp.async copies the rows of the next
// one to a stage in shared memory; each thread later reads only the elements that it copied.
#pragma once

#include "cuda/kernels/tile.cuh"
#include "cuda/plan.h"

namespace mlp_ext::cuda {
namespace tall {

constexpr int kThreads = 256, kHalf = kThreads / 2;
constexpr int kDepth = 64;  // columns of x in shared memory at a time, forward
template <class S>
constexpr int kBlocks = sizeof(S) == 8 ? 1 : 2;  // of a processor, at 128 registers a thread
template <class T>
constexpr int kRows = 1024 / sizeof(T);  // of a tile at most, forward
template <class T>
constexpr int kElements = 32768 / sizeof(T);  // of x in it
template <class T>
constexpr int kTileRows = sizeof(T) == 4 ? 64 : 32;  // of a tile, backward

// The results of one thread: each value read from shared memory is used as often.
constexpr int kPart = 4;
template <class T>
constexpr int kColumns = sizeof(T) == 4 ? 8 : 4;
// Backward, half of the threads hold dW.
static_assert(kTallWeightBytes / sizeof(float) == kHalf * kPart * kColumns<float>);
static_assert(kTallWeightBytes / sizeof(double) == kHalf * kPart * kColumns<double>);

template <class S>
int64_t blocks(int64_t tiles, int64_t shared, const Device& device) {
  const int64_t reserved = 1024;  // by CUDA, for each block
  const int64_t fit = std::max<int64_t>(1, std::min<int64_t>(kBlocks<S>, device.shared / (shared + reserved)));
  return std::min(tiles, device.processors * fit);
}

// Elements from row to row of a stage.
template <class S>
__host__ __device__ int stage_stride(int columns) {
  return static_cast<int>(round_up(columns, kVector<S>));
}

// Starts the asynchronous copy of rows from `row` on, columns from `column` on, to the stage. Call it with all threads
// of the block. fill() with the same V and columns reads them, each thread the elements it copied.
template <int V, class S>
__device__ void prefetch(const Rows<S>& stage, int rows, int columns, const Rows<const S>& m, int64_t row,
                         int64_t rows_end, int64_t column, int64_t columns_end) {
  const int across = static_cast<int>(ceil_div(columns, V)), down = kThreads / across;
  const int c = threadIdx.x % across * V, first = threadIdx.x / across;
  if (first >= down || column + c >= columns_end) return;
  for (int r = first; r < rows && row + r < rows_end; r += down)
    copy_async<V>(stage.at(r, c), m.at(row + r, column + c));
}

// tile[r, c] = source(row + r, column + c), zero beyond rows_end and columns_end. By all threads of the block.
template <int V, class T, class Source>
__device__ void fill(const Pointer<T>& tile, int stride, int rows, int columns, const Source& source, int64_t row,
                     int64_t rows_end, int64_t column, int64_t columns_end) {
  using Raw = typename Source::template Raw<V>;
  constexpr int kBatch = V == 1 ? 2 : 1;  // loads under way
  constexpr int kPiece = V < kStep ? V : kStep;
  const int across = static_cast<int>(ceil_div(columns, V)), down = kThreads / across;
  const int c = threadIdx.x % across * V, first = threadIdx.x / across;
  if (first >= down) return;
  const bool column_inside = column + c < columns_end;
  for (int r0 = first; r0 < rows; r0 += kBatch * down) {
    Raw raw[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int r = r0 + i * down;
      if (r < rows && row + r < rows_end && column_inside) raw[i] = source.template fetch<V>(row + r, column + c);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int r = r0 + i * down;
      if (r >= rows) break;
      const bool inside = row + r < rows_end && column_inside;
#pragma unroll
      for (int v = 0; v < V; v += kPiece) {
        Vector<T, kPiece> piece;
#pragma unroll
        for (int p = 0; p < kPiece; ++p) piece.at[p] = inside ? source.template value<V>(raw[i], v + p) : T(0);
        store(tile + (r * stride + c + v), piece);
      }
    }
  }
}

// P x Q results of a thread: row p lies `row_step` rows on, columns are groups of four, `column_step` apart.
template <class S, int P, int Q, class T, class F>
__device__ void store_results(const Rows<S>& out, int64_t row, int row_step, int64_t rows_end, int64_t column,
                              int column_step, int64_t columns_end, bool vectors, const T (&sum)[P][Q], const F& f) {
#pragma unroll
  for (int p = 0; p < P; ++p) {
    const int64_t m = row + p * row_step;
    if (m >= rows_end) break;
#pragma unroll
    for (int q = 0; q < Q; q += kStep) {
      const int64_t n = column + q / kStep * column_step;
      Vector<S, kStep> results;
#pragma unroll
      for (int i = 0; i < kStep; ++i)
        if (n + i < columns_end) results.at[i] = from_accumulator<S>(f(sum[p][q + i], n + i));
      if (vectors) {
        if (n < columns_end) store(out.at(m, n), results);
      } else {
#pragma unroll
        for (int i = 0; i < kStep; ++i)
          if (n + i < columns_end) *out.at(m, n + i) = results.at[i];
      }
    }
  }
}

// Whether groups of four columns may be written at once.
template <class S>
__device__ bool in_groups(const Rows<S>& m, int64_t columns) {
  return in_vectors(m, columns) && columns % kStep == 0;
}

template <class T>
struct ForwardTiles {
  int K, N;
  int column_groups;     // of threads
  int depth;             // columns of x at a time
  int row_groups, rows;  // of threads, and of the tile
  int x_stride, w_stride;
  __host__ __device__ ForwardTiles(int64_t K_, int64_t N_)
      : K(static_cast<int>(K_)),
        N(static_cast<int>(N_)),
        column_groups(static_cast<int>(ceil_div(N, kColumns<T>))),
        depth(static_cast<int>(smaller(kDepth, round_up(K, kStep)))),
        row_groups(
            static_cast<int>(smaller(smaller(kRows<T>, kElements<T> / depth) / kPart, kThreads / column_groups))),
        rows(row_groups * kPart),
        x_stride(row_stride(depth)),
        w_stride(column_groups * kColumns<T> + kStep) {}
  __host__ __device__ int padded_depth() const { return static_cast<int>(round_up(K, kStep)); }
  __host__ __device__ int w_size() const { return (padded_depth() + 1) * w_stride; }
  __host__ __device__ int x_size() const { return rows * x_stride; }
  template <class S>
  int64_t shared() const {
    return shared_bytes<T>(w_size()) + shared_bytes<T>(x_size()) + shared_bytes<S>(rows * stage_stride<S>(depth));
  }
};

template <class T>
struct BackwardTiles {
  int K, N;
  int rows = kTileRows<T>;
  int column_groups;     // of threads along K
  int depth, dz_stride;  // N rounded up, row of the tile of dz
  int width;             // K rounded up: row of the tiles of W, dW and x
  __host__ __device__ BackwardTiles(int64_t K_, int64_t N_)
      : K(static_cast<int>(K_)),
        N(static_cast<int>(N_)),
        column_groups(static_cast<int>(ceil_div(K, kColumns<T>))),
        depth(static_cast<int>(round_up(N, kStep))),
        dz_stride(row_stride(N)),
        width(column_groups * kColumns<T>) {}
  __host__ __device__ int weights() const { return depth * width; }
  template <class S>
  int64_t shared() const {
    return shared_bytes<T>(weights()) + shared_bytes<T>(rows * dz_stride) + shared_bytes<T>(rows * width) +
           2 * shared_bytes<S>(rows * stage_stride<S>(depth)) + shared_bytes<S>(rows * stage_stride<S>(width));
  }
};

}  // namespace tall

// K and N from 1 to kTallWidth.
template <class S>
Launch tall_forward_launch(const Forward<S>& f, const Device& device) {
  const tall::ForwardTiles<Accumulator<S>> tiles(f.K, f.N);
  const int64_t shared = tiles.template shared<S>();
  return {tall::blocks<S>(ceil_div(f.M, tiles.rows), shared, device), 1, tall::kThreads, shared};
}

// y = act(x W^T + b)   (M,K)(K,N)
template <class S, class Act>
__global__ void __launch_bounds__(tall::kThreads, tall::kBlocks<S>) tall_forward(const Forward<S> f, const Act act) {
  using T = Accumulator<S>;
  constexpr int P = tall::kPart, Q = tall::kColumns<T>;
  const tall::ForwardTiles<Accumulator<S>> tiles(f.K, f.N);
  SharedMemory shared;
  const auto w = shared.take<T>(tiles.w_size());  // [K rounded up, N rounded up], then the bias
  const auto x = shared.take<T>(tiles.x_size());  // [rows, depth]
  const int stage_stride = tall::stage_stride<S>(tiles.depth);
  const Rows<S> stage{shared.take<S>(tiles.rows * stage_stride), stage_stride};
  const bool x_vectors = in_vectors(f.x, f.K), y_vectors = tall::in_groups(f.y, f.N);
  const bool stores_z = kStoresZ<Act> && f.z.data, z_vectors = stores_z && tall::in_groups(f.z, f.N);
  const auto prefetch = [&](int64_t m, int k0) {
    if (x_vectors)
      tall::prefetch<kVector<S>>(stage, tiles.rows, tiles.depth, f.x, m, f.M, k0, tiles.K);
    else
      tall::prefetch<1>(stage, tiles.rows, tiles.depth, f.x, m, f.M, k0, tiles.K);
  };
  const auto take = [&](int64_t m, int k0) {
    const Plain<S> source{{stage.data, stage.stride}};
    if (x_vectors)
      tall::fill<kVector<S>>(x, tiles.x_stride, tiles.rows, tiles.depth, source, 0, f.M - m, 0, tiles.K - k0);
    else
      tall::fill<1>(x, tiles.x_stride, tiles.rows, tiles.depth, source, 0, f.M - m, 0, tiles.K - k0);
  };
  const int64_t first = blockIdx.x * int64_t{tiles.rows}, step = gridDim.x * int64_t{tiles.rows};
  prefetch(first, 0);
  const int depth = tiles.padded_depth(), bias = depth * tiles.w_stride;
  for (int i = threadIdx.x; i < bias; i += tall::kThreads) {
    const int k = i % depth, n = i / depth;  // neighbours along K, as W lies in memory
    w[k * tiles.w_stride + n] = k < tiles.K && n < tiles.N ? to_accumulator(*f.w.at(n, k)) : T(0);
  }
  for (int n = threadIdx.x; n < tiles.w_stride; n += tall::kThreads)
    w[bias + n] = f.bias && n < tiles.N ? to_accumulator(f.bias[n]) : T(0);

  const int column = threadIdx.x % tiles.column_groups, row = threadIdx.x / tiles.column_groups;
  const bool computes = row < tiles.row_groups;
  const int column_step = tiles.column_groups * kStep;
  const AlongDepth<T> a{x + row * tiles.x_stride, tiles.x_stride, tiles.row_groups};
  for (int64_t m = first; m < f.M; m += step) {
    T sum[P][Q] = {};
    for (int k0 = 0; k0 < tiles.K; k0 += tall::kDepth) {
      wait_copies();
      __syncthreads();  // x was read
      take(m, k0);
      __syncthreads();
      const bool more = k0 + tall::kDepth < tiles.K;
      prefetch(more ? m : m + step, more ? k0 + tall::kDepth : 0);
      if (!computes) continue;
      const AcrossDepth<T> b{w + (k0 * tiles.w_stride + column * kStep), tiles.w_stride, column_step};
#pragma unroll 1
      for (int k = 0; k < tall::kDepth && k0 + k < tiles.K; k += kStep) add_product(sum, a, b, k);
    }
    if (!computes) continue;
#pragma unroll 1
    for (int i = stores_z ? 0 : 1; i < 2; ++i) {  // z, then y; two calls would spill registers
      const bool is_z = i == 0;
      const Rows<S> out{is_z ? f.z.data : f.y.data, is_z ? f.z.stride : f.y.stride};
      tall::store_results(out, m + row, tiles.row_groups, f.M, column * kStep, column_step, f.N,
                          is_z ? z_vectors : y_vectors, sum, [&](T z, int64_t n) {
                            z += w[bias + n];
                            return is_z ? z : act.forward(z);
                          });
    }
  }
}

// K and N from 1 to kTallWidth. Of the workspace, each block needs tall_backward_part elements.
template <class S>
Launch tall_backward_launch(const Backward<S>& b, const Device& device) {
  const tall::BackwardTiles<Accumulator<S>> tiles(b.K, b.N);
  const int64_t shared = tiles.template shared<S>();
  return {tall::blocks<S>(ceil_div(b.M, tiles.rows), shared, device), 1, tall::kThreads, shared};
}

// Accumulators of dW and db of one block: parts is [blocks, tall_backward_part].
template <class S>
__host__ __device__ int64_t tall_backward_part(const Backward<S>& b) {
  return b.N * b.K + b.N;
}

// dz = act'(dy, saved);  dx = dz W   (M,N)(N,K);  and of the block's rows  dW = dz^T x   (N,M)(M,K);  db = column sums
// of dz. Half of the threads make dx; the others keep dW and db in registers from tile to tile.
template <class S, class Act>
__global__ void __launch_bounds__(tall::kThreads, tall::kBlocks<S>)
    tall_backward(const Backward<S> b, const Act act, const Pointer<Accumulator<S>> parts) {
  using T = Accumulator<S>;
  constexpr int P = tall::kPart, Q = tall::kColumns<T>;
  const tall::BackwardTiles<T> tiles(b.K, b.N);
  SharedMemory shared;
  const auto w = shared.take<T>(tiles.weights());                // [depth, width]
  const auto dz = shared.take<T>(tiles.rows * tiles.dz_stride);  // [rows, depth]
  const auto x = shared.take<T>(tiles.rows * tiles.width);       // [rows, width]
  const int dz_stage = tall::stage_stride<S>(tiles.depth), x_stage = tall::stage_stride<S>(tiles.width);
  const Rows<S> dy_rows{shared.take<S>(tiles.rows * dz_stage), dz_stage},
      saved_rows{shared.take<S>(tiles.rows * dz_stage), dz_stage},
      x_rows{shared.take<S>(tiles.rows * x_stage), x_stage};
  const bool dz_vectors = in_vectors(b.dy, b.N) && in_vectors(b.saved, b.N), x_vectors = in_vectors(b.x, b.K),
             dx_vectors = tall::in_groups(b.dx, b.K);
  const auto prefetch = [&](const Rows<S>& stage, int columns, const Rows<const S>& from, int64_t m, bool vectors,
                            int64_t end) {
    if (vectors)
      tall::prefetch<kVector<S>>(stage, tiles.rows, columns, from, m, b.M, 0, end);
    else
      tall::prefetch<1>(stage, tiles.rows, columns, from, m, b.M, 0, end);
  };
  const auto ask_all = [&](int64_t m) {
    prefetch(dy_rows, tiles.depth, b.dy, m, dz_vectors, b.N);
    if (reads_saved(act, b.saved)) prefetch(saved_rows, tiles.depth, b.saved, m, dz_vectors, b.N);
    if (b.dw) prefetch(x_rows, tiles.width, b.x, m, x_vectors, b.K);
  };
  const auto take = [](const Pointer<T>& tile, int stride, int rows, int columns, const auto& source, int64_t rows_end,
                       int64_t columns_end, bool vectors) {
    if (vectors)
      tall::fill<kVector<S>>(tile, stride, rows, columns, source, 0, rows_end, 0, columns_end);
    else
      tall::fill<1>(tile, stride, rows, columns, source, 0, rows_end, 0, columns_end);
  };
  const int64_t first = blockIdx.x * int64_t{tiles.rows}, step = gridDim.x * int64_t{tiles.rows};
  ask_all(first);
  if (b.dx.data) take(w, tiles.width, tiles.depth, tiles.width, Plain<S>{b.w}, b.N, b.K, in_vectors(b.w, b.K));

  const int t = threadIdx.x % tall::kHalf, column_step = tiles.column_groups * kStep, down = tiles.rows / P;
  const int k = t % tiles.column_groups * kStep, n = t / tiles.column_groups * P;  // of dW
  const bool for_dx = threadIdx.x < tall::kHalf && b.dx.data, for_dw = threadIdx.x >= tall::kHalf && n < tiles.depth;
  T sum[P][Q] = {}, db[P] = {};  // of dx, or all of dW
  const auto add_db = [&](const T(&column)[P]) {
#pragma unroll
    for (int p = 0; p < P; ++p) db[p] += column[p];
  };
  for (int64_t m = first; m < b.M; m += step) {
    wait_copies();
    const GradZ<S, Act> grad_z{{dy_rows.data, dz_stage}, {saved_rows.data, dz_stage}, act};
    take(dz, tiles.dz_stride, tiles.rows, tiles.depth, grad_z, b.M - m, b.N, dz_vectors);
    if (b.dw) take(x, tiles.width, tiles.rows, tiles.width, Plain<S>{{x_rows.data, x_stage}}, b.M - m, b.K, x_vectors);
    __syncthreads();
    ask_all(m + step);
    if (for_dx)
      for (int i = t; i < down * tiles.column_groups; i += tall::kHalf) {
        const int column = i % tiles.column_groups * kStep, row = i / tiles.column_groups;
        const AlongDepth<T> rows{dz + row * tiles.dz_stride, tiles.dz_stride, down};
        const AcrossDepth<T> columns{w + column, tiles.width, column_step};
#pragma unroll
        for (int p = 0; p < P; ++p)
#pragma unroll
          for (int q = 0; q < Q; ++q) sum[p][q] = 0;
#pragma unroll 1
        for (int d = 0; d < tiles.depth; d += kStep) add_product(sum, rows, columns, d);
        tall::store_results(b.dx, m + row, down, b.M, column, column_step, b.K, dx_vectors, sum,
                            [](T v, int64_t) { return v; });
      }
    if (for_dw) {
      const AcrossDepth<T> rows{dz + n, tiles.dz_stride, kStep}, columns{x + k, tiles.width, column_step};
      if (b.dw)
#pragma unroll 1
        for (int i = 0; i < tiles.rows; i += kStep) add_product(sum, rows, columns, i, add_db);
      else
        for (int i = 0; i < tiles.rows; i += kStep) for_depth<P>(rows, i, add_db);
    }
    __syncthreads();  // dz and x were read
  }

  const auto part = parts + blockIdx.x * tall_backward_part(b);
  if (!for_dw) return;
#pragma unroll
  for (int p = 0; p < P; ++p) {
    if (n + p >= tiles.N) break;
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      const int column = k + q / kStep * column_step + q % kStep;
      if (b.dw && column < tiles.K) part[(n + p) * tiles.K + column] = sum[p][q];
    }
    if (b.db && k == 0) part[tiles.N * tiles.K + n + p] = db[p];
  }
}

namespace tall {
constexpr int kSumColumns = 32, kSumRows = 32;  // threads of a block of sum_parts
}

template <class S>
Launch sum_parts_launch(const Backward<S>& b) {
  using namespace tall;
  const int64_t shared = shared_bytes<Accumulator<S>>(kSumColumns * kSumRows);
  return {b.dw || b.db ? ceil_div(tall_backward_part(b), kSumColumns) : 0, 1, kSumColumns * kSumRows, shared};
}

// dW and db: the sums of the parts [count, tall_backward_part], always in the same order.
template <class S>
__global__ void __launch_bounds__(tall::kSumColumns* tall::kSumRows)
    sum_parts(const Pointer<const Accumulator<S>> parts, int64_t count, const Backward<S> b) {
  using T = Accumulator<S>;
  using tall::kSumColumns, tall::kSumRows;
  const int64_t weights = b.N * b.K, size = tall_backward_part(b);
  const int column = threadIdx.x % kSumColumns, row = threadIdx.x / kSumColumns;
  const int64_t i = blockIdx.x * int64_t{kSumColumns} + column;
  const bool wanted = i < size && (i < weights ? b.dw : b.db);
  T sum = 0;
  if (wanted)
#pragma unroll 8
    for (int64_t p = row; p < count; p += kSumRows) sum += parts[p * size + i];
  SharedMemory shared;
  const auto sums = shared.take<T>(kSumColumns * kSumRows);
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (row > 0 || !wanted) return;
  T total = 0;
#pragma unroll
  for (int r = 0; r < kSumRows; ++r) total += sums[r * kSumColumns + column];
  if (i < weights)
    b.dw[i] = from_accumulator<S>(total);
  else
    b.db[i - weights] = from_accumulator<S>(total);
}

}  // namespace mlp_ext::cuda
