// Training step of a narrow network: each block of rows goes forward, through the loss and backward through all layers
// before the next block, so that activations stay in the cache. Compiled once per instruction set.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/dots-inl.h"
#include "cpu/simd/epilogue-inl.h"
#include "cpu/simd/gemm-inl.h"
#include "cpu/simd/loss-inl.h"
#include "cpu/simd/pack-inl.h"
#include "cpu/simd/row_sums-inl.h"
#include "cpu/simd/vec-inl.h"

namespace mlp_ext::cpu {
namespace {

// Rows of the same stride in all layers, so that a layer's output is the next one's packed A. The stride is an odd
// number of cache lines.
template <class T, int width>
struct RowsOfBlock {
  static constexpr int row_step = width + 64 / sizeof(T), depth_step = 1;
  static int64_t row(int64_t i) { return i * row_step; }
};
template <class T, int width>
struct RowsOfBlockTransposed {
  static constexpr int row_step = 1, depth_step = RowsOfBlock<T, width>::row_step;
  static int64_t row(int64_t i) { return i; }
};

// GEMMs of a block in layout RowsOfBlock.
template <class T, int width>
struct BlockGemms {
  using V = Vec<T>;
  using Block = RowsOfBlock<T, width>;
  static constexpr int64_t kStride = Block::row_step;

  // y = act(z + b) in registers; BiasActTile does the same by tiles.
  template <class Act>
  struct Forward {
    static constexpr bool whole_depth = true;
    const T* bias;
    T* y;
    Forward from(int64_t i, int64_t j) const { return {bias + j, y + i * kStride + j}; }
    template <class Lanes>
    void operator()(int64_t i, int64_t j, V z, Lanes lanes) const {
      store(y + i * kStride + j, Act{}.forward(z + load(bias + j, lanes)), lanes);
    }
  };
  // z + b
  struct AddBias {
    static constexpr bool whole_depth = true;
    const T* bias;
    T* z;
    int64_t stride;
    AddBias from(int64_t i, int64_t j) const { return {bias + j, z + i * stride + j, stride}; }
    template <class Lanes>
    void operator()(int64_t i, int64_t j, V v, Lanes lanes) const {
      store(z + i * stride + j, v + load(bias + j, lanes), lanes);
    }
    template <class Lanes>
    void column(int64_t i, V v, Lanes lanes) const {
      store(z + i, v + V(bias[0]), lanes);
    }
  };
  // dz = act'(dy, saved) of the layer below, in registers or by tiles.
  template <class Act>
  struct Backward {
    static constexpr bool whole_depth = true;
    const T* saved;
    T* dz;
    Backward from(int64_t i, int64_t j) const { return {saved + i * kStride + j, dz + i * kStride + j}; }
    template <class Lanes>
    void operator()(int64_t i, int64_t j, V dy, Lanes lanes) const {
      const int64_t at = i * kStride + j;
      store(dz + at, Act{}.backward(dy, load(saved + at, lanes)), lanes);
    }
  };
  struct BackwardTile {
    static constexpr bool whole_depth = true, takes_tiles = true;
    const Activation* activation;
    const T* saved;
    T* dz;
    void tile(int64_t i, int64_t j, T* sums, int rows, int columns) const {
      const int64_t at = i * kStride + j;
      pointwise_of<T>().grad_z(*activation, {sums, Tile<T>::columns}, {saved + at, kStride}, {dz + at, kStride},
                               nullptr, rows, columns);
    }
  };
  // dW += sums
  struct AddTo {
    static constexpr bool whole_depth = true;
    T* dw;
    int64_t stride;
    AddTo from(int64_t i, int64_t j) const { return {dw + i * stride + j, stride}; }
    template <class Lanes>
    void operator()(int64_t i, int64_t j, V v, Lanes lanes) const {
      T* const at = dw + i * stride + j;
      store(at, load(at, lanes) + v, lanes);
    }
  };

  template <class Finish>
  static __attribute__((noinline)) void gemm(const T* a, Panels<T> b, int64_t depth, int64_t rows, int64_t columns,
                                             const Finish& finish) {
    Prefetcher none;
    tiles<Block, Single<T>, Tile<T>::rows>(a, b, depth, 0, rows, columns, Stage{true, true}, Partial<T>{}, finish,
                                           none);
  }

  // dW += dz^T x;  db += sum over rows of dz
  static __attribute__((noinline)) void add_gradients(const StepLayerView& l, const T* x, const T* dz, T* sums,
                                                      double* db_totals, int64_t count) {
    if (l.db >= 0) {
      alignas(kVectorBytes) T db_block[width];
      for_vectors<T>(l.N, [&](int64_t n, auto lanes) {
        V db[4];
        int64_t m = 0;
        for (; m + 4 <= count; m += 4)
          for (int i = 0; i < 4; ++i) db[i] = db[i] + load(dz + (m + i) * kStride + n, lanes);
        for (; m < count; ++m) db[0] = db[0] + load(dz + m * kStride + n, lanes);
        store(db_block + n, (db[0] + db[1]) + (db[2] + db[3]), lanes);
      });
      add_up(db_totals, db_block, l.N);
    }
    Prefetcher none;
    if (l.dw >= 0)
      tiles<RowsOfBlockTransposed<T, width>, Single<T>, Tile<T>::rows>(dz, Panels<T>::in_place(x, kStride), count, 0,
                                                                       l.N, l.K, Stage{true, true}, Partial<T>{},
                                                                       AddTo{sums + l.dw, l.K}, none);
  }
};

template <class S, int width>
struct StepRows {
  using T = Accumulator<S>;
  using V = Vec<T>;
  using Block = BlockGemms<T, width>;
  static constexpr int64_t kRows = Blocking<T>::rows, kStride = Block::kStride, kBlock = kRows * kStride;

  // Packed weights, the sums of db, and blocks of rows: the input, y and (if needed) z of each layer, two gradients,
  // and two for the loss.
  static size_t scratch_bytes(const StepProblem& p) {
    int64_t elements = (p.layers.size() + 5) * kBlock;
    for (const StepLayerView& l : p.layers) elements += needs_z(*l.activation) ? kBlock : 0;
    for (const StepLayerView& l : p.layers)
      elements += l.K * round_up_columns<T>(l.N) + l.N * round_up_columns<T>(l.K) +
                  round_up_columns<T>(l.N) * (1 + sizeof(double) / sizeof(T));
    return elements * sizeof(T);
  }

  // Sums dW [N, K] and db [N] of each layer that needs them into `sums`.
  static double run(const StepProblem& p, Range rows, void* sums_out, void* scratch, bool& valid) {
    const size_t L = p.layers.size();
    T* const sums = static_cast<T*>(sums_out);
    T* const blocks = static_cast<T*>(scratch);  // x and each layer's output
    T *dz = blocks + (L + 1) * kBlock, *dz_below = dz + kBlock, *const for_loss = dz_below + kBlock;
    T* packed = for_loss + 2 * kBlock;
    T *z_of[kMostLayers], *saved[kMostLayers];  // hidden layers: z if needed; z or y for backward
    for (size_t l = 0; l + 1 < L; ++l) {
      z_of[l] = needs_z(*p.layers[l].activation) ? std::exchange(packed, packed + kBlock) : nullptr;
      saved[l] = z_of[l] ? z_of[l] : blocks + (l + 1) * kBlock;
    }
    const T *w[kMostLayers], *wt[kMostLayers], *bias[kMostLayers];
    double* db[kMostLayers];
    for (size_t l = 0; l < L; ++l) {
      const StepLayerView& layer = p.layers[l];
      if (l + 1 == L && p.limits->tiles_mostly_empty(layer.K, layer.N))
        for (int64_t n = 0; n < layer.N; ++n)
          for_vectors<T>(layer.K, [&](int64_t k, auto lanes) {
            store(packed + n * layer.K + k, load(at<S>(layer.w, n, k), lanes), lanes);
          });
      else
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
      db[l] = reinterpret_cast<double*>(packed);
      packed += round_up_columns<T>(layer.N) * (sizeof(double) / sizeof(T));
      std::fill(db[l], db[l] + layer.N, 0.0);
    }
    std::fill(sums, sums + p.sums, T(0));
    const StepLayerView& top = p.layers[L - 1];
    double loss = 0;
    for (int64_t m0 = rows.begin; m0 < rows.end; m0 += kRows) {
      const int64_t count = std::min<int64_t>(kRows, rows.end - m0);
      for (int64_t m = 0; m < count; ++m)
        for_vectors<T>(p.layers[0].K, [&](int64_t k, auto lanes) {
          store(blocks + m * kStride + k, load(at<S>(p.x, m0 + m, k), lanes), lanes);
        });
      T* y = blocks;
      for (size_t l = 0; l + 1 < L; ++l, y += kBlock) {
        const StepLayerView& layer = p.layers[l];
        const auto run = [&](const auto& finish) {
          Block::gemm(y, Panels<T>::packed(wt[l], layer.K), layer.K, count, layer.N, finish);
        };
        with_act_in_registers(
            *layer.activation,
            [&](auto act) { run(typename Block::template Forward<decltype(act)>{bias[l], y + kBlock}); },
            [&] { run(BiasActTile<T>{layer.activation, bias[l], y + kBlock, z_of[l], kStride, kStride, false}); });
      }

      // The loss takes contiguous rows.
      T *const z = y + kBlock, *const top_dz = dz_below;
      const typename Block::AddBias finish{bias[L - 1], z, top.N};
      if (p.limits->tiles_mostly_empty(top.K, top.N))
        dots<T, Single<T>>({y, kStride}, {wt[L - 1], top.K}, {count, top.K, top.N}, {0, count}, {0, top.N}, finish);
      else
        Block::gemm(y, Panels<T>::packed(wt[L - 1], top.K), top.K, count, top.N, finish);
      loss += loss_of_rows<S>(p.loss, *top.activation, {m0, m0 + count}, top.N, z, top_dz, for_loss, valid);
      for (int64_t m = 0; m < count; ++m)
        for_vectors<T>(top.N, [&](int64_t n, auto lanes) {
          store(dz + m * kStride + n, load(top_dz + m * top.N + n, lanes), lanes);
        });

      for (size_t l = L; l-- > p.lowest; y -= kBlock) {
        const StepLayerView& layer = p.layers[l];
        Block::add_gradients(layer, y, dz, sums, db[l], count);
        if (l == p.lowest) break;
        const Activation& below = *p.layers[l - 1].activation;
        const auto run = [&](const auto& finish) {
          Block::gemm(dz, Panels<T>::packed(w[l], layer.N), layer.N, count, layer.K, finish);
        };
        with_act_in_registers(
            below, [&](auto act) { run(typename Block::template Backward<decltype(act)>{saved[l - 1], dz_below}); },
            [&] { run(typename Block::BackwardTile{&below, saved[l - 1], dz_below}); });
        std::swap(dz, dz_below);
      }
    }
    for (size_t l = p.lowest; l < L; ++l)
      if (p.layers[l].db >= 0) round_sums(db[l], p.layers[l].N, sums + p.layers[l].db);
    return loss;
  }
};

// Narrow networks use a shorter row stride.
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
  static constexpr StepKernels kernels{scratch_bytes, rows, loss_rows<S>, update_by_parts<S>, update_by_parts<S, S>};
};

}  // namespace

namespace MLP_EXT_TARGET {

const StepKernels& step_kernels(DType dtype) {
  static constexpr StepKernels table[]{Steps<float>::kernels, Steps<double>::kernels, Steps<BFloat16>::kernels,
                                       Steps<Half>::kernels};
  return table[static_cast<size_t>(dtype)];
}

}  // namespace MLP_EXT_TARGET
}  // namespace mlp_ext::cpu
