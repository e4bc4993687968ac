// A training step of a narrow network, block of rows by block of rows: each goes forward, through the loss and backward
// through all layers before the next, so that its activations never leave the cache and take no memory per row.
// Compiled once per instruction set, like kernels-inl.h.
#pragma once

#include "cpu/gemm.h"
#include "cpu/kernels.h"
#include "cpu/pack.h"
#include "cpu/update.h"
#include "cpu/vec.h"
#include "losses.h"

namespace mlp_ext::cpu {
namespace {

// Rows of one width for all layers, so that what one layer writes the next reads as A. An odd number of cache lines.
template <class T, int width>
struct RowsOfBlock {
  static constexpr int row_step = width + 64 / sizeof(T), depth_step = 1;
  static constexpr int64_t panel = Tile<T>::rows * row_step;
};
template <class T, int width>
struct RowsOfBlockTransposed {
  static constexpr int row_step = 1, depth_step = RowsOfBlock<T, width>::row_step;
  static constexpr int64_t panel = Tile<T>::rows;
};

// The loss of a block of outputs y [rows, N] and its gradient dy, both as rows of T.
template <class S>
struct BlockLoss {
  using T = Accumulator<S>;
  using V = Vec<T>;

  // Returns the sum of the losses, not scaled; clears `valid` where BCE meets what is no probability.
  static double run(const Loss& loss, Range rows, int64_t N, const T* y, T* dy, int64_t stride, bool& valid) {
    if (loss.index == activation_index(CrossEntropy::name, Losses{}))
      return cross_entropy(loss, rows, N, y, dy, stride);
    return visit_activation(
        loss.index, [&](auto l) { return elements<decltype(l)>(loss, rows, N, y, dy, stride, valid); },
        ElementLosses{});
  }

  template <class L>
  static double elements(const Loss& loss, Range rows, int64_t N, const T* y, T* dy, int64_t stride, bool& valid) {
    const V scale = static_cast<T>(loss.scale);
    double total = 0;
    for (int64_t m = rows.begin; m < rows.end; ++m, y += stride, dy += stride) {
      V sum;
      for_vectors<T>(N, [&](int64_t n, auto lanes) {
        const V yn = load(y + n, lanes), t = load(at<S>(loss.target, m, n), lanes);
        if constexpr (std::is_same_v<L, BCE>) valid = valid && are_probabilities(yn) && are_probabilities(t);
        store(dy + n, L::backward(yn, t) * scale, lanes);
        sum = sum + only(L::forward(yn, t), lanes);
      });
      total += sum_lanes(sum);
    }
    return total;
  }

  static V only(V v, AllLanes) { return v; }
  static V only(V v, int n) {  // the loss of a lane that is not there may be anything
    for (int i = n; i < V::lanes; ++i) v.v[i] = 0;
    return v;
  }
  static bool are_probabilities(V v) {
    bool all = true;
    for (int i = 0; i < V::lanes; ++i) all = all && v.v[i] >= 0 && v.v[i] <= 1;
    return all;
  }

  // The terms of q times log_softmax(z), and the gradient Q softmax(z) - q.
  static double cross_entropy(const Loss& loss, Range rows, int64_t N, const T* z, T* dz, int64_t stride) {
    const T smoothing = static_cast<T>(loss.label_smoothing), even = smoothing / static_cast<T>(N),
            scale = static_cast<T>(loss.scale);
    const S* const weights = static_cast<const S*>(loss.weight);
    const auto weight = [&](int64_t n) { return weights ? load(weights + n, 1).v[0] : T(1); };
    double total = 0;
    for (int64_t m = rows.begin; m < rows.end; ++m, z += stride, dz += stride) {
      const int64_t c = loss.classes ? loss.classes[m * loss.classes_stride] : -1;
      if (loss.classes && c == loss.ignore_index) {
        std::fill(dz, dz + N, T(0));
        continue;
      }
      T most = z[0];
      for (int64_t n = 1; n < N; ++n) most = z[n] > most || z[n] != z[n] ? z[n] : most;
      T sum = 0, all_q = 0, row = 0;
      for_vectors<T>(N, [&](int64_t n, auto lanes) {
        const V e = exp(load(z + n, lanes) - V(most));
        store(dz + n, e, lanes);
        sum += sum_lanes(only(e, lanes));
      });
      const T log_sum = std::log(sum) + most;
      const auto q = [&](int64_t n) {
        if (!loss.classes) return weight(n) * ((1 - smoothing) * load(at<S>(loss.target, m, n), 1).v[0] + even);
        return (n == c ? weight(n) * (1 - smoothing) : T(0)) + (smoothing == 0 ? T(0) : weight(n) * even);
      };
      for (int64_t n = 0; n < N; ++n) {
        if (loss.classes && smoothing == 0 && n != c) continue;  // 0 log 0
        row -= q(n) * (z[n] - log_sum);
        all_q += q(n);
      }
      for (int64_t n = 0; n < N; ++n) dz[n] = (dz[n] / sum * all_q - q(n)) * scale;
      total += row;
    }
    return total;
  }
};

template <class S, int width>
struct StepRows {
  using T = Accumulator<S>;
  using V = Vec<T>;
  using Block = RowsOfBlock<T, width>;
  static constexpr int64_t kRows = Blocking<T>::rows, kStride = Block::row_step, kBlock = kRows * kStride;

  // Packed weights, and a block of each layer's rows and of two gradients.
  static size_t scratch_bytes(const StepProblem& p) {
    int64_t elements = (p.layers.size() + 3) * kBlock;
    for (const StepLayerView& l : p.layers)
      elements += l.K * round_up_columns<T>(l.N) + l.N * round_up_columns<T>(l.K) + round_up_columns<T>(l.N);
    return elements * sizeof(T);
  }

  // Gradients summed over the rows go to `sums`: of each layer dW [N, K] and db [N], where they are.
  static double run(const StepProblem& p, Range rows, void* sums_out, void* scratch, bool& valid) {
    T* const sums = static_cast<T*>(sums_out);
    T* const blocks = static_cast<T*>(scratch);  // of x and of each layer's output
    T *dy = blocks + (p.layers.size() + 1) * kBlock, *dx = dy + kBlock;
    T* packed = dx + kBlock;
    const T *w[kMostLayers], *wt[kMostLayers], *bias[kMostLayers];
    for (size_t l = 0; l < p.layers.size(); ++l) {
      const StepLayerView& layer = p.layers[l];
      pack_panels_transposed<S>(layer.w, 0, layer.K, 0, layer.N, packed);
      wt[l] = packed;
      packed += layer.K * round_up_columns<T>(layer.N);
      if (l > p.lowest) pack_panels<S>(layer.w, 0, layer.N, 0, layer.K, packed);
      w[l] = packed;
      packed += layer.N * round_up_columns<T>(layer.K);
      for_vectors<T>(layer.N, [&](int64_t n, auto lanes) {
        store(packed + n, layer.bias ? load(static_cast<const S*>(layer.bias) + n, lanes) : V(), lanes);
      });
      bias[l] = packed;
      packed += round_up_columns<T>(layer.N);
    }
    std::fill(sums, sums + p.sums, T(0));
    double loss = 0;
    for (int64_t m0 = rows.begin; m0 < rows.end; m0 += kRows) {
      const int64_t count = std::min<int64_t>(kRows, rows.end - m0);
      for (int64_t m = 0; m < count; ++m)
        for_vectors<T>(p.layers[0].K, [&](int64_t k, auto lanes) {
          store(blocks + m * kStride + k, load(at<S>(p.x, m0 + m, k), lanes), lanes);
        });
      T* y = blocks;
      for (size_t l = 0; l < p.layers.size(); ++l, y += kBlock)
        visit_activation(p.layers[l].activation, [&](auto act) {
          return forward<decltype(act)>(p.layers[l], wt[l], bias[l], y, y + kBlock, count);
        });
      loss += BlockLoss<S>::run(p.loss, {m0, m0 + count}, p.layers.back().N, y, dy, kStride, valid);
      for (size_t l = p.layers.size(); l-- > p.lowest; y -= kBlock) {
        visit_activation(p.layers[l].activation, [&](auto act) {
          return backward<decltype(act)>(p.layers[l], l > p.lowest ? w[l] : nullptr, y - kBlock, y, dy, dx, sums,
                                         count);
        });
        std::swap(dy, dx);
      }
    }
    return loss;
  }

 private:
  // y = act(x W^T + b)
  template <class Act>
  static bool forward(const StepLayerView& l, const T* wt, const T* bias, const T* x, T* y, int64_t count) {
    Ahead none;
    tiles<Block, Single<T>, Tile<T>::rows>(x, Panels<T>::packed(wt, l.K), l.K, 0, count, l.N, Stage{true, true},
                                           Partial<T>{}, StoreSums<T>{y, kStride}, none);
    for (int64_t m = 0; m < count; ++m, y += kStride)
      for_vectors<T>(l.N, [&](int64_t n, auto lanes) {
        store(y + n, Act::forward(load(y + n, lanes) + load(bias + n, lanes)), lanes);
      });
    return true;
  }

  // dz = act'(dy, y), in the place of dy;  dx = dz W;  dW += dz^T x;  db += sum over rows of dz
  template <class Act>
  static bool backward(const StepLayerView& l, const T* w, const T* x, const T* y, T* dy, T* dx, T* sums,
                       int64_t count) {
    for_vectors<T>(l.N, [&](int64_t n, auto lanes) {
      V db;
      for (int64_t m = 0; m < count; ++m) {
        T* const at = dy + m * kStride + n;
        const V dz = Act::backward(load(at, lanes), load(y + m * kStride + n, lanes));
        store(at, dz, lanes);
        db = db + dz;
      }
      if (l.db >= 0) store(sums + l.db + n, load(sums + l.db + n, lanes) + db, lanes);
    });
    Ahead none;
    if (l.dw >= 0)
      tiles<RowsOfBlockTransposed<T, width>, Single<T>, Tile<T>::rows>(
          dy, Panels<T>::in_place(x, kStride), count, 0, l.N, l.K, Stage{false, false}, Partial<T>{sums + l.dw, l.K, 0},
          StoreSums<T>{}, none);
    if (w)
      tiles<Block, Single<T>, Tile<T>::rows>(dy, Panels<T>::packed(w, l.N), l.N, 0, count, l.K, Stage{true, true},
                                             Partial<T>{}, StoreSums<T>{dx, kStride}, none);
    return true;
  }
};

// The same from outputs and to gradients as they lie in memory, [M, N] without gaps.
template <class S>
double loss_rows(const Loss& loss, Range rows, int64_t N, const void* y_data, void* dy_data, void* scratch,
                 bool& valid) {
  using T = Accumulator<S>;
  const S* const y = static_cast<const S*>(y_data);
  S* const dy = static_cast<S*>(dy_data);
  if constexpr (std::is_same_v<S, T>) {
    return BlockLoss<S>::run(loss, rows, N, y + rows.begin * N, dy + rows.begin * N, N, valid);
  } else {
    T *const row = static_cast<T*>(scratch), *const gradient = row + N;
    double total = 0;
    for (int64_t m = rows.begin; m < rows.end; ++m) {
      for_vectors<T>(N, [&](int64_t n, auto lanes) { store(row + n, load(y + m * N + n, lanes), lanes); });
      total += BlockLoss<S>::run(loss, {m, m + 1}, N, row, gradient, N, valid);
      for_vectors<T>(N, [&](int64_t n, auto lanes) { store(dy + m * N + n, load(gradient + n, lanes), lanes); });
    }
    return total;
  }
}

// Rows as narrow as the network allows: they lie closer together.
template <class S>
struct Steps {
  static constexpr int kNarrow = 256 / sizeof(Accumulator<S>), kWide = kStepRowBytes / sizeof(Accumulator<S>);
  static bool is_narrow(const StepProblem& p) {
    int64_t most = p.layers[0].K;
    for (const StepLayerView& l : p.layers) most = std::max(most, l.N);
    return most <= kNarrow;
  }
  static size_t scratch_bytes(const StepProblem& p) {
    return is_narrow(p) ? StepRows<S, kNarrow>::scratch_bytes(p) : StepRows<S, kWide>::scratch_bytes(p);
  }
  static double rows(const StepProblem& p, Range rows, void* sums, void* scratch, bool& valid) {
    return is_narrow(p) ? StepRows<S, kNarrow>::run(p, rows, sums, scratch, valid)
                        : StepRows<S, kWide>::run(p, rows, sums, scratch, valid);
  }
  static constexpr StepKernels kernels{scratch_bytes, rows, loss_rows<S>, update<S>};
};

const StepKernels& step_kernels(DType dtype) {
  static constexpr StepKernels table[]{Steps<float>::kernels, Steps<double>::kernels, Steps<BFloat16>::kernels,
                                       Steps<Half>::kernels};
  return table[static_cast<size_t>(dtype)];
}

}  // namespace
}  // namespace mlp_ext::cpu
