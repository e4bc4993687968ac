// Whole training steps of small networks, one network to a block: many epochs and batches in one launch, the weights on
// chip from the first to the last.
//
// Rows of a batch go forward, through the loss and backward 32 at a time; gradients are added up over them, and the
// update follows. On chip all is in the dtype of accumulation, and a parameter as rounded as in memory, so that many
// steps at once equal as many launches to the bit. dz takes the place of y. A bias is the column K of W, beside a
// column of ones in x. The optimizer's states stay in global memory; each element's are read and written by one thread.
#pragma once

#include "cuda/kernels/problem.cuh"
#include "cuda/plan.h"
#include "math/losses.h"
#include "math/optimizers.h"

namespace mlp_ext::cuda {

template <class S>
struct alignas(16) StepParameter {  // and how it is updated, if it learns
  Pointer<S> value;                 // nullptr: there is none
  Optimizer optimizer;
  Pointer<S> states[kMaxStates];  // nullptr where the optimizer does not have that state
  double count;                   // of the steps before this launch; on the GPU in one of:
  Pointer<const float> float_count;
  Pointer<const double> double_count;
};
struct StepLayer {
  int K, N;
  Activation activation;
  bool keeps_z;  // its backward needs z rather than y
  bool has_bias, weight_learns, bias_learns;
  // On chip, where W, x, y and what backward needs, y or z, begin, and from row to row of W and x, and of y and z.
  int w = 0, x = 0, y = 0, saved = 0, stride = 0, y_stride = 0;
};
template <class S>
struct StepLoss {
  LossFunction function;
  bool mean;
  int64_t classes_stride, ignore_index;
  Pointer<const S> weight;  // [N] or nullptr
};
// What the networks of a launch share. Batch i of an epoch uses rows order[i * batch : (i + 1) * batch]; the last
// batch may be smaller.
template <class S>
struct Steps {
  int64_t epochs, batch;
  int64_t batches;     // in an epoch, of the network with most rows
  int64_t input_rows;  // of each network's input
  StepLoss<S> loss;
  int layers, lowest_learning;
  StepLayer layer[kStepLayers];
  int weights = 0, on_chip_rows = 0;  // elements on chip
};
// The data of one network.
template <class S>
struct alignas(16) StepData {
  int64_t rows;                    // of an epoch
  Pointer<const int64_t> order;    // [epochs, rows], indices among the input's rows; nullptr: rows in their own order
  Rows<const S> x;                 // [input_rows, K]
  Rows<const S> target;            // [input_rows, N]; unread with classes
  Pointer<const int64_t> classes;  // [input_rows] or nullptr
  Pointer<S> losses;               // [epochs, batches], each of before its update
};

// Where a block finds its network: in the arguments of the launch, or in global memory.
template <class S>
struct OneNetwork {
  static constexpr int kBlocks = 1;  // at least so many on a processor at once
  StepData<S> only;
  StepParameter<S> parameters[2 * kStepLayers];  // of each layer its weight and its bias
  __device__ StepData<S> data() const { return only; }
  __device__ StepParameter<S> parameter(int i) const { return parameters[i]; }
};
template <class S>
struct ManyNetworks {
  static constexpr int kBlocks = sizeof(S) == 8 ? 1 : 2;  // what registers allow without spills
  Pointer<const StepData<S>> networks;
  Pointer<const StepParameter<S>> parameters;  // [networks, each]
  int each;
  __device__ StepData<S> data() const { return networks[blockIdx.x]; }
  __device__ StepParameter<S> parameter(int i) const { return parameters[int64_t{blockIdx.x} * each + i]; }
};

namespace step {

constexpr int kThreads = 256, kWarp = 32, kWarps = kThreads / kWarp;
constexpr int kParameters = 2 * kStepLayers;

struct alignas(16) ReadyOptimizer {
  Optimizer optimizer;  // at the step that runs
};
static_assert(kParameters * sizeof(ReadyOptimizer) <= kStepOptimizerBytes);

template <class T>
struct OnChip {
  Pointer<T> weights, gradients;       // of each layer [N, K and the bias]
  Pointer<T> rows;                     // of each layer x [kStepRows, K and the ones], and the output; some layers' z
  Pointer<T> counts, losses;           // [kWarps]
  Pointer<ReadyOptimizer> optimizers;  // [kParameters]: of each layer its weight's and its bias's
};

// Not inlined: each product has 17 places that call one, and each would hold the code of all activations.
// By value, since a kernel's argument whose address is taken is copied to local memory.
template <class T>
__attribute__((noinline)) __device__ T act_forward(Activation activation, T z) {
  return visit(activation, [&](const auto& act) { return act.forward(z); });
}
template <class T>
__attribute__((noinline)) __device__ T act_backward(Activation activation, T dy, T saved) {
  return visit(activation, [&](const auto& act) { return act.backward(dy, saved); });
}

// The sum over the block and over calls since `first`: put before a barrier, taken after it; always in the same order.
template <class T>
__device__ void put_sum(const Pointer<T>& sums, T v, bool first = true) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) v += __shfl_xor_sync(~0u, v, lanes);
  if (threadIdx.x % kWarp) return;
  const auto sum = sums + threadIdx.x / kWarp;
  *sum = first ? v : *sum + v;
}
template <class T>
__device__ T take_sum(const Pointer<T>& sums) {
  T total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += sums[w];
  return total;
}

// f(place in memory, place on chip) for each element of the weight, or of the bias, always in the same thread.
template <class F>
__device__ void for_elements(const StepLayer& layer, bool is_bias, const F& f) {
  const int columns = is_bias ? 1 : layer.K, first = layer.w + (is_bias ? layer.K : 0);
  for (int i = threadIdx.x; i < layer.N * columns; i += kThreads)
    f(i, first + i / columns * layer.stride + i % columns);
}

template <class T>
struct Operand {  // [count, depth]
  Pointer<T> data;
  int count, stride, depth_stride;
};

// finish(row, column, sum) for all results, sum = a[row] . b[column] over the depth. A thread makes kPart x kPart of
// them at a time, which lie apart: neighbours in a warp have neighbouring columns, hence different banks.
template <int kPart, class T, class Finish>
__device__ void product_by(const Operand<T>& a, const Operand<T>& b, int depth, const Finish& finish) {
  const int down = static_cast<int>(ceil_div(a.count, kPart)), across = static_cast<int>(ceil_div(b.count, kPart));
  for (int part = threadIdx.x; part < down * across; part += kThreads) {
    const int row = part / across, column = part % across;
    int a_at[kPart], b_at[kPart];
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
      a_at[i] = static_cast<int>(smaller(row + i * down, a.count - 1)) * a.stride;
      b_at[i] = static_cast<int>(smaller(column + i * across, b.count - 1)) * b.stride;
    }
    T sum[kPart][kPart] = {};
    for (int k = 0; k < depth; ++k) {
      T a_k[kPart], b_k[kPart];
#pragma unroll
      for (int i = 0; i < kPart; ++i) {
        a_k[i] = a.data[a_at[i] + k * a.depth_stride];
        b_k[i] = b.data[b_at[i] + k * b.depth_stride];
      }
#pragma unroll
      for (int i = 0; i < kPart; ++i)
#pragma unroll
        for (int j = 0; j < kPart; ++j) sum[i][j] += a_k[i] * b_k[j];
    }
#pragma unroll
    for (int i = 0; i < kPart; ++i)
#pragma unroll
      for (int j = 0; j < kPart; ++j)
        if (row + i * down < a.count && column + j * across < b.count)
          finish(row + i * down, column + j * across, sum[i][j]);
  }
}

// By count: two loads of shared memory for each term one by one, half of one in parts, but those need many results.
template <class T, class Finish>
__device__ void product(const Operand<T>& a, const Operand<T>& b, int depth, const Finish& finish) {
  if (a.count * b.count <= 2 * kThreads)
    product_by<1>(a, b, depth, finish);
  else
    product_by<4>(a, b, depth, finish);
}

// y = act(x W^T + b)   (M,K)(K,N)
template <class T>
__device__ void forward(const StepLayer& layer, int rows, const OnChip<T>& chip) {
  product<T>({chip.rows + layer.x, rows, layer.stride, 1}, {chip.weights + layer.w, layer.N, layer.stride, 1},
             layer.K + (layer.has_bias ? 1 : 0), [&](int m, int n, T z) {
               const int at = m * layer.y_stride + n;
               if (layer.keeps_z) chip.rows[layer.saved + at] = z;
               chip.rows[layer.y + at] = act_forward(layer.activation, z);
             });
}

// dW and db = dz^T (x and the ones)   (N,M)(M,K)
template <class T>
__device__ void add_gradients(const StepLayer& layer, int rows, bool first, const OnChip<T>& chip) {
  product<T>({chip.rows + layer.y, layer.N, 1, layer.y_stride},
             {chip.rows + layer.x, layer.K + (layer.has_bias ? 1 : 0), 1, layer.stride}, rows,
             [&](int n, int k, T sum) {
               const auto gradient = chip.gradients + (layer.w + n * layer.stride + k);
               *gradient = first ? sum : *gradient + sum;
             });
}

// dx = dz W   (M,N)(N,K), and dz of the layer below in the place of its y
template <class T>
__device__ void backward(const StepLayer& layer, const StepLayer& below, int rows, const OnChip<T>& chip) {
  product<T>({chip.rows + layer.y, rows, layer.y_stride, 1}, {chip.weights + layer.w, layer.K, 1, layer.stride},
             layer.N, [&](int m, int k, T dy) {
               const int at = m * below.y_stride + k;
               const T saved = chip.rows[below.saved + at];
               chip.rows[below.y + at] = act_backward(below.activation, dy, saved);
             });
}

template <class S>
__device__ int64_t input_row(const Steps<S>& f, const StepData<S>& data, int64_t i) {
  const int64_t row = data.order ? int64_t(data.order[i]) : i;
  device_assert(0 <= row && row < f.input_rows, "a row of the input");
  return row;
}

// The class of a row, or -1 where it is ignored.
template <class S>
__device__ int64_t class_of(const Steps<S>& f, const StepData<S>& data, int64_t i) {
  const int64_t c = data.classes[input_row(f, data, i) * f.loss.classes_stride];
  if (c == f.loss.ignore_index) return -1;
  device_assert(0 <= c && c < f.layer[f.layers - 1].N, "a class");
  return c;
}

// This thread's share of the sum of class weights over a batch.
template <class S, class T = Accumulator<S>>
__device__ T weight_of_classes(const Steps<S>& f, const StepData<S>& data, int64_t begin, int64_t count) {
  T total = 0;
  for (int64_t m = threadIdx.x; m < count; m += kThreads) {
    const int64_t c = class_of(f, data, begin + m);
    if (c >= 0) total += f.loss.weight ? to_accumulator(f.loss.weight[c]) : T(1);
  }
  return total;
}

// The loss of single elements: the sum over this thread's, not scaled; dz in the place of y.
template <class S, class T, class Loss>
__device__ T elements(const Steps<S>& f, const StepData<S>& data, const Loss& loss, int64_t begin, int rows, T scale,
                      const OnChip<T>& chip) {
  const StepLayer& layer = f.layer[f.layers - 1];
  T total = 0;
  for (int i = threadIdx.x; i < rows * layer.N; i += kThreads) {
    const int m = i / layer.N, n = i % layer.N, at = m * layer.y_stride + n;
    const T y = chip.rows[layer.y + at], t = to_accumulator(*data.target.at(input_row(f, data, begin + m), n));
    const T w = f.loss.weight ? to_accumulator(f.loss.weight[n]) : T(1), saved = chip.rows[layer.saved + at];
    if constexpr (is_of_probabilities<Loss>) device_assert(0 <= y && y <= 1 && 0 <= t && t <= 1, "a probability");
    chip.rows[layer.y + at] = act_backward(layer.activation, loss.backward(y, t, w, scale), saved);
    total += loss.forward(y, t, w);
  }
  return total;
}

// The Row of math/losses.h; dz takes the place of y.
template <class S, class T>
struct Row {
  const Steps<S>& f;
  const StepData<S>& data;
  const StepLayer& layer;
  const OnChip<T>& chip;
  int first;                  // from layer.y on
  int64_t row, class_of_row;  // the row of the target

  __device__ int64_t c() const { return class_of_row; }
  __device__ T z(int64_t n) const { return chip.rows[layer.y + first + n]; }
  __device__ T t(int64_t n) const { return to_accumulator(*data.target.at(row, n)); }
  __device__ T w(int64_t n) const { return f.loss.weight ? to_accumulator(f.loss.weight[n]) : T(1); }
  __device__ T exp(int64_t n, T most) const { return std::exp(z(n) - most); }
  __device__ T sum_exp(T most) const {
    T sum = 0;
    for (int n = 0; n < layer.N; ++n) sum += exp(n, most);
    return sum;
  }
  __device__ void put(int64_t n, T dy) const {
    const T saved = chip.rows[layer.saved + first + n];
    chip.rows[layer.y + first + n] = act_backward(layer.activation, dy, saved);
  }
};

// The loss of whole rows, a row for each of the first threads; dz in the place of y.
template <class S, class T, class Loss>
__device__ T whole_rows(const Steps<S>& f, const StepData<S>& data, const Loss& loss, int64_t begin, int rows, T scale,
                        const OnChip<T>& chip) {
  const int m = threadIdx.x;
  if (m >= rows) return 0;
  const StepLayer& layer = f.layer[f.layers - 1];
  const int64_t c = data.classes ? class_of(f, data, begin + m) : -1;
  const Row<S, T> row{f, data, layer, chip, m * layer.y_stride, input_row(f, data, begin + m), c};
  if (!data.classes || c >= 0) return loss.template row<T>(row, layer.N, scale);
  loss.template ignored_row<T>(row, layer.N);
  return 0;
}

template <class S, class T>
__device__ T loss(const Steps<S>& f, const StepData<S>& data, int64_t begin, int rows, T scale, const OnChip<T>& chip) {
  return visit(f.loss.function, [&](const auto& loss) {
    if constexpr (is_of_rows<std::remove_cvref_t<decltype(loss)>>)
      return whole_rows(f, data, loss, begin, rows, scale, chip);
    else
      return elements(f, data, loss, begin, rows, scale, chip);
  });
}

// What the sum of the losses is multiplied by: of the mean, one over the elements, the rows or their classes' weights.
template <class S, class T>
__device__ T loss_scale(const Steps<S>& f, const StepData<S>& data, int64_t count, const OnChip<T>& chip) {
  if (!f.loss.mean) return 1;
  if (data.classes) return 1 / take_sum(chip.counts);
  const bool by_rows =
      visit(f.loss.function, [](const auto& loss) { return is_of_rows<std::remove_cvref_t<decltype(loss)>>; });
  return 1 / static_cast<T>(by_rows ? count : count * f.layer[f.layers - 1].N);
}

// Each optimizer at its next step, `done` steps after the launch's first. One thread for each parameter, since pow of
// double is slow, and of the last warp, which a small layer leaves idle.
template <class S, class Networks, class T>
__device__ void begin_step(const Steps<S>& f, const Networks& networks, int64_t done, const OnChip<T>& chip) {
  const int i = static_cast<int>(threadIdx.x) - (kThreads - kParameters);
  if (i < 0 || i >= 2 * f.layers) return;
  const StepLayer& layer = f.layer[i / 2];
  if (i % 2 ? !layer.bias_learns : !layer.weight_learns) return;
  const StepParameter<S> p = networks.parameter(i);
  double count = p.count;
  if (p.float_count) count = *p.float_count;
  if (p.double_count) count = *p.double_count;
  chip.optimizers[i] = ReadyOptimizer{at_step(p.optimizer, count + static_cast<double>(done + 1))};
}

template <class S, class Networks, class T>
__device__ void update(const Steps<S>& f, const Networks& networks, int l, bool is_bias, bool last,
                       const OnChip<T>& chip) {
  const StepLayer& layer = f.layer[l];
  if (is_bias ? !layer.bias_learns : !layer.weight_learns) return;
  const int which = 2 * l + (is_bias ? 1 : 0);
  const StepParameter<S> p = networks.parameter(which);
  const ReadyOptimizer ready = chip.optimizers[which];
  visit(ready.optimizer, [&](const auto& optimizer) {
    constexpr int kStates = std::tuple_size_v<decltype(std::remove_cvref_t<decltype(optimizer)>::states)>;
    for_elements(layer, is_bias, [&](int i, int at) {
      T value = chip.weights[at], state[kMaxStates] = {};
#pragma unroll
      for (int s = 0; s < kStates; ++s)
        if (p.states[s]) state[s] = to_accumulator(p.states[s][i]);
      optimizer.update(value, state, T(chip.gradients[at]));
      const S rounded = from_accumulator<S>(value);
      chip.weights[at] = to_accumulator(rounded);
#pragma unroll
      for (int s = 0; s < kStates; ++s)
        if (p.states[s]) p.states[s][i] = from_accumulator<S>(state[s]);
      if (last) p.value[i] = rounded;
    });
  });
}

}  // namespace step

// Places the layers on chip.
template <class S>
Launch steps_launch(Steps<S>& f, int64_t networks) {
  using T = Accumulator<S>;
  f.weights = f.on_chip_rows = 0;
  for (int l = 0; l < f.layers; ++l) {
    StepLayer& layer = f.layer[l];
    layer.w = f.weights;
    layer.x = f.on_chip_rows;
    layer.stride = static_cast<int>(step_row_stride(layer.K));
    layer.y_stride = static_cast<int>(step_row_stride(layer.N));
    f.weights += layer.N * layer.stride;
    layer.y = f.on_chip_rows += kStepRows * layer.stride;
  }
  f.on_chip_rows += kStepRows * f.layer[f.layers - 1].y_stride;
  for (int l = 0; l < f.layers; ++l) {
    StepLayer& layer = f.layer[l];
    layer.saved = layer.keeps_z ? f.on_chip_rows : layer.y;
    if (layer.keeps_z) f.on_chip_rows += kStepRows * layer.y_stride;
  }
  const int64_t shared = 2 * shared_bytes<T>(f.weights) + shared_bytes<T>(f.on_chip_rows) +
                         2 * shared_bytes<T>(step::kWarps) + shared_bytes<step::ReadyOptimizer>(step::kParameters);
  return {networks, 1, step::kThreads, shared};
}

template <class S, class Networks>
__global__ void __launch_bounds__(step::kThreads, Networks::kBlocks)
    train_steps(const Steps<S> f, const Networks networks) {
  using T = Accumulator<S>;
  SharedMemory shared;
  step::OnChip<T> chip;
  chip.weights = shared.take<T>(f.weights);
  chip.gradients = shared.take<T>(f.weights);
  chip.rows = shared.take<T>(f.on_chip_rows);
  chip.counts = shared.take<T>(step::kWarps);
  chip.losses = shared.take<T>(step::kWarps);
  chip.optimizers = shared.take<step::ReadyOptimizer>(step::kParameters);
  for (int l = 0; l < f.layers; ++l) {
    const StepLayer& layer = f.layer[l];
    const Pointer<S> weight = networks.parameter(2 * l).value, bias = networks.parameter(2 * l + 1).value;
    step::for_elements(layer, false, [&](int i, int at) { chip.weights[at] = to_accumulator(weight[i]); });
    if (layer.has_bias)
      step::for_elements(layer, true, [&](int i, int at) { chip.weights[at] = to_accumulator(bias[i]); });
    if (threadIdx.x < kStepRows) chip.rows[layer.x + int(threadIdx.x) * layer.stride + layer.K] = 1;
  }

  const StepLayer& lowest = f.layer[0];
  StepData<S> data = networks.data();  // of the epoch
  int64_t done = 0;                    // steps
  for (int64_t epoch = 0; epoch < f.epochs; ++epoch) {
    for (int64_t batch = 0, begin = 0; begin < data.rows; ++batch, ++done, begin += f.batch) {
      const int64_t count = smaller(f.batch, data.rows - begin);
      if (data.classes) step::put_sum(chip.counts, step::weight_of_classes(f, data, begin, count));
      T scale = 0;
      for (int64_t m0 = 0; m0 < count; m0 += kStepRows) {
        const int rows = static_cast<int>(smaller(kStepRows, count - m0));
        for (int i = threadIdx.x; i < rows * lowest.K; i += step::kThreads) {
          const int m = i / lowest.K, k = i % lowest.K;
          chip.rows[m * lowest.stride + k] = to_accumulator(*data.x.at(step::input_row(f, data, begin + m0 + m), k));
        }
        __syncthreads();
        if (m0 == 0) {
          scale = step::loss_scale(f, data, count, chip);
          step::begin_step(f, networks, done, chip);
        }
        for (int l = 0; l < f.layers; ++l) {
          step::forward(f.layer[l], rows, chip);
          __syncthreads();
        }
        step::put_sum(chip.losses, step::loss(f, data, begin + m0, rows, scale, chip), m0 == 0);
        __syncthreads();
        for (int l = f.layers; l-- > f.lowest_learning;) {
          step::add_gradients(f.layer[l], rows, m0 == 0, chip);
          __syncthreads();
          if (l == f.lowest_learning) break;
          step::backward(f.layer[l], f.layer[l - 1], rows, chip);
          __syncthreads();
        }
      }
      const bool last = epoch + 1 == f.epochs && begin + f.batch >= data.rows;
      for (int l = f.lowest_learning; l < f.layers; ++l) {
        step::update(f, networks, l, false, last, chip);
        step::update(f, networks, l, true, last, chip);
      }
      if (threadIdx.x == 0) data.losses[batch] = from_accumulator<S>(step::take_sum(chip.losses) * scale);
    }
    if (data.order) data.order = data.order + data.rows;
    data.losses = data.losses + f.batches;
  }
}

}  // namespace mlp_ext::cuda
