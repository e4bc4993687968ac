// Training step of a wide network on a small batch, layer by layer. Activations are stored transposed, as packed panels
// of B: [ceil(M / width)][F][width] for F features and M rows, with width = Tile::columns, so that each GEMM's output
// is the next one's packed input. W is A and needs a plain copy only. Compiled once per instruction set.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/epilogue-inl.h"
#include "cpu/simd/gemm-inl.h"
#include "cpu/simd/loss-inl.h"
#include "cpu/simd/pack-inl.h"
#include "cpu/simd/vec-inl.h"

namespace mlp_ext::cpu {
namespace {

template <class T>
struct PanelSteps {
  using V = Vec<T>;
  static constexpr int64_t width = Tile<T>::columns;
  static constexpr int64_t kRowsInL1 = Tile<T>::rows;  // rows of A packed at a time

  static_assert(kMostPanelBytes <= Blocking<T>::depth * sizeof(T));  // dW takes one depth block
  static_assert((4 * width + 1) * kMostPanelOutputs * sizeof(T) <= kScratchBytes);

  static int64_t panel_width() { return width; }

  // Element (feature f, row m) of panels of F features.
  template <class Pointer>
  static Pointer element(Pointer panels, int64_t F, int64_t f, int64_t m) {
    return panels + (m / width * F + f) * width + m % width;
  }
  static Panels<T> panels(const void* data, int64_t F, int64_t f, int64_t m) {
    return {element(static_cast<const T*>(data), F, f, m), width, F * width};
  }
  static Partial<T> partial(T* data, int64_t F, int64_t f, int64_t m) {
    return {element(data, F, f, m), width, F * width};
  }

  // y = act(z + b), in registers or by tiles (which also store z, if given). The bias is constant along a row.
  template <class Act>
  struct Forward {
    static constexpr bool whole_depth = false;
    const T* bias;  // or nullptr
    T* y;
    int64_t F;
    Forward from(int64_t i, int64_t j) const { return {bias ? bias + i : bias, element(y, F, i, j), F}; }
    template <class Lanes>
    void operator()(int64_t i, int64_t j, V z, Lanes lanes) const {
      if (bias) z = z + V(bias[i]);
      store(element(y, F, i, j), Act{}.forward(z), lanes);
    }
  };
  struct ForwardTile {
    static constexpr bool whole_depth = false, takes_tiles = true;
    const Activation* activation;
    const T* bias;  // or nullptr
    T *y, *z;       // z may be nullptr
    int64_t F, row, column;
    ForwardTile from(int64_t i, int64_t j) const { return {activation, bias, y, z, F, row + i, column + j}; }
    void tile(int64_t i, int64_t j, T* sums, int rows, int columns) const {
      i += row, j += column;
      if (bias || z)
        for_sums(sums, rows, columns, [&](int r, int c, V v, auto lanes) {
          if (bias) v = v + V(bias[i + r]);
          store(sums + r * width + c, v, lanes);
          if (z) store(element(z, F, i + r, j) + c, v, lanes);
        });
      pointwise_of<T>().act(*activation, {sums, width}, {element(y, F, i, j), width}, rows, columns, false);
    }
  };
  // dz = act'(dy, saved) of the layer below, in registers or by tiles.
  template <class Act>
  struct Backward {
    static constexpr bool whole_depth = false;
    const T* saved;
    T* dz;
    int64_t F;
    Backward from(int64_t i, int64_t j) const { return {element(saved, F, i, j), element(dz, F, i, j), F}; }
    template <class Lanes>
    void operator()(int64_t i, int64_t j, V dy, Lanes lanes) const {
      const V operand = std::is_same_v<Act, Identity> ? dy : load(element(saved, F, i, j), lanes);
      store(element(dz, F, i, j), Act{}.backward(dy, operand), lanes);
    }
  };
  struct BackwardTile {
    static constexpr bool whole_depth = false, takes_tiles = true;
    const Activation* activation;
    const T* saved;
    T* dz;
    int64_t F;
    BackwardTile from(int64_t i, int64_t j) const {
      return {activation, element(saved, F, i, j), element(dz, F, i, j), F};
    }
    void tile(int64_t i, int64_t j, T* sums, int rows, int columns) const {
      pointwise_of<T>().grad_z(*activation, {sums, width}, {element(saved, F, i, j), width},
                               {element(dz, F, i, j), width}, nullptr, rows, columns);
    }
  };

  static void input(const ConstMatrix& x, Range rows, int64_t K, void* out) {
    for (int64_t m = rows.begin; m < rows.end; m += width)
      pack_panels_transposed<T>(x, 0, K, m, std::min(width, rows.end - m), element(static_cast<T*>(out), K, 0, m));
  }

  // Prefetches the rows of W that are packed next: those below, or those of the next depth block.
  static void read_next(const PanelLayer& l, Range rows, int64_t i, int64_t count, Range columns, int64_t k,
                        int64_t depth, Prefetcher& prefetcher) {
    const bool below = rows.begin + i + count < rows.end;
    const int64_t next_i = below ? rows.begin + i + count : rows.begin, next_k = below ? k : k + depth;
    const int64_t n_rows = std::min<int64_t>(kRowsInL1, rows.end - next_i);
    const int64_t n_columns = std::min(depth, columns.end - next_k);
    if (n_columns > 0) prefetcher.enqueue(at<T>(l.w, next_i, next_k), l.K * sizeof(T), n_rows, n_columns * sizeof(T));
  }

  // y = act(x W^T + b), transposed   (N,K)(K,M)
  static void forward(const PanelLayer& l, Range features, Range rows, void* scratch) {
    const auto pack_w = [&](int64_t i, int64_t count, int64_t k0, int64_t depth, bool, T* packed,
                            Prefetcher& prefetcher) {
      read_next(l, features, i, count, {0, l.K}, k0, depth, prefetcher);
      for (int64_t r = 0; r < count; ++r, packed += RowsOfA<T>::packed_step)
        for_vectors<T>(depth, [&](int64_t k, auto lanes) {
          store(packed + k, load(at<T>(l.w, features.begin + i + r, k0 + k), lanes), lanes);
        });
    };
    T* const y = static_cast<T*>(l.y);
    const T* const bias = static_cast<const T*>(l.bias);
    const auto run = [&](const auto& finish) {
      gemm<RowsOfA<T>, Single<T>, T>(features.size(), rows.size(), l.K, pack_w, nothing_to_pack,
                                     panels(l.x, l.K, 0, rows.begin), partial(y, l.N, features.begin, rows.begin),
                                     finish.from(features.begin, rows.begin), static_cast<T*>(scratch), kRowsInL1);
    };
    with_act_in_registers(
        *l.activation, [&](auto act) { run(Forward<decltype(act)>{bias, y, l.N}); },
        [&] { run(ForwardTile{l.activation, bias, y, static_cast<T*>(l.z), l.N, 0, 0}); });
  }

  // The loss of y = activation(z) and its gradient dz, for the top layer's outputs z.
  static double loss(const Loss& loss, const PanelLayer& l, const Activation& activation, Range rows, void* scratch,
                     bool& valid) {
    T *const z = static_cast<T*>(scratch), *const dz = z + width * l.N, *const rest = dz + width * l.N;
    double total = 0;
    for (int64_t m = rows.begin; m < rows.end; m += width) {
      const Range some{m, std::min(m + width, rows.end)};
      unpack(element(static_cast<const T*>(l.y), l.N, 0, m), l.N, some.size(), z);
      total += loss_of_rows<T>(loss, activation, some, l.N, z, dz, rest, valid);
      pack_panels_transposed<T>({dz, l.N}, 0, l.N, 0, some.size(), element(static_cast<T*>(l.dz), l.N, 0, m));
    }
    return total;
  }

  // dz_below = act'(dz W, y_below) for a block of columns of W, then W is updated there by dW = dz^T x: no other thread
  // reads that block. Without a layer below the block may be split over rows. Updates the biases in `biases`.
  static void backward(const PanelLayer& l, Range rows, Range columns, Range biases, void* scratch) {
    if (l.dz_below) grad_input(l, columns, scratch);
    if (l.update_w) grad_weight(l, rows, columns, scratch);
    if (l.update_b) grad_bias(l, biases);
  }

  static constexpr PanelKernels kernels{panel_width, input, forward, loss, backward};

 private:
  static constexpr auto nothing_to_pack = [](int64_t, int64_t, int64_t, int64_t, T*) {};

  // Unpacks a panel to contiguous z [rows, N].
  static void unpack(const T* panel, int64_t N, int64_t rows, T* z) {
    constexpr int lanes = V::lanes;
    for_vectors<T>(N, [&](int64_t n, auto n_lanes) {
      for (int64_t h = 0; h < rows; h += lanes) {
        V square[lanes];
        for (int64_t i = 0; i < std::min<int64_t>(lanes, N - n); ++i) square[i] = load(panel + (n + i) * width + h);
        transpose(square);
        for (int64_t i = 0; i < std::min<int64_t>(lanes, rows - h); ++i) store(z + (h + i) * N + n, square[i], n_lanes);
      }
    });
  }

  // dz_below = act'((dz W)^T)   (K,N)(N,M)
  static void grad_input(const PanelLayer& l, Range columns, void* scratch) {
    const auto pack_w = [&](int64_t i, int64_t count, int64_t n0, int64_t depth, bool, T* packed,
                            Prefetcher& prefetcher) {
      const int64_t k = columns.begin + i, next = next_rows(columns.end - k - count);
      if (next > 0)
        prefetcher.enqueue(at<T>(l.w, n0, k + count), l.K * sizeof(T), depth, next * sizeof(T));
      else if (n0 + depth < l.N)
        prefetcher.enqueue(at<T>(l.w, n0 + depth, columns.begin), l.K * sizeof(T),
                           std::min<int64_t>(Blocking<T>::depth, l.N - n0 - depth),
                           next_rows(columns.size()) * sizeof(T));
      for (int64_t n = 0; n < depth; ++n)
        for (int64_t r = 0; r < count; r += Tile<T>::rows)
          for_vectors<T>(std::min<int64_t>(Tile<T>::rows, count - r), [&](int64_t c, auto lanes) {
            store(packed + r / Tile<T>::rows * ColumnsOfA<T>::panel + n * ColumnsOfA<T>::depth_step + c,
                  load(at<T>(l.w, n0 + n, k + r + c), lanes));
          });
    };
    T* const dz_below = static_cast<T*>(l.dz_below);
    const T* const saved = static_cast<const T*>(l.saved_below);
    const auto run = [&](const auto& finish) {
      gemm<ColumnsOfA<T>, Single<T>, T>(columns.size(), l.M, l.N, pack_w, nothing_to_pack, panels(l.dz, l.N, 0, 0),
                                        partial(dz_below, l.K, columns.begin, 0), finish.from(columns.begin, 0),
                                        static_cast<T*>(scratch));
    };
    with_act_in_registers(
        *l.activation_below, [&](auto act) { run(Backward<decltype(act)>{saved, dz_below, l.K}); },
        [&] { run(BackwardTile{l.activation_below, saved, dz_below, l.K}); });
  }
  static int64_t next_rows(int64_t rows) { return std::min<int64_t>(Blocking<T>::rows, rows); }

  // dW = dz^T x   (N,M)(M,K)
  static void grad_weight(const PanelLayer& l, Range rows, Range columns, void* scratch) {
    const auto pack_dz = [&](int64_t i, int64_t count, int64_t m0, int64_t depth, bool, T* packed,
                             Prefetcher& prefetcher) {
      const int64_t n = rows.begin + i, next = std::min<int64_t>(kRowsInL1, rows.end - n - count);
      if (next > 0)
        prefetcher.enqueue(at<T>(l.w, n + count, columns.begin), l.K * sizeof(T), next,
                           std::min<int64_t>(Blocking<T>::columns, columns.size()) * sizeof(T));
      for (int64_t m = 0; m < depth; m += width)
        for (int64_t r = 0; r < count; ++r)
          for_vectors<T>(std::min(width, depth - m), [&](int64_t c, auto lanes) {
            store(packed + r * RowsOfA<T>::packed_step + m + c,
                  load(element(static_cast<const T*>(l.dz), l.N, n + r, m0 + m) + c, lanes), lanes);
          });
    };
    const auto pack_x = [&](int64_t m0, int64_t depth, int64_t j, int64_t count, T* packed) {
      if (l.rows_of_x.data) return pack_panels<T>(l.rows_of_x, m0, depth, columns.begin + j, count, packed);
      for (int64_t c = 0; c < count; c += width)
        for (int64_t m = 0; m < depth; m += width) {
          const T* const corner = element(static_cast<const T*>(l.x), l.K, columns.begin + j + c, m0 + m);
          pack_panels_transposed<T>({corner, width}, 0, std::min(width, depth - m), 0, std::min(width, count - c),
                                    packed + c * depth + m * width);
        }
    };
    const int64_t offset = rows.begin * l.K + columns.begin;
    T* const w = static_cast<T*>(l.update_w->parameter);  // never holds partial sums: there is one depth block
    gemm<RowsOfA<T>, Single<T>, T>(rows.size(), columns.size(), l.M, pack_dz, pack_x, Panels<T>{}, Partial<T>{w, l.K},
                                   UpdateTile<T>{l.update_w, offset, l.K}, static_cast<T*>(scratch), kRowsInL1);
  }

  static void grad_bias(const PanelLayer& l, Range range) {
    for_vectors<T>(range.size(), [&](int64_t i, auto) {
      const int64_t count = std::min<int64_t>(V::lanes, range.size() - i);
      alignas(kVectorBytes) T db[V::lanes] = {};
      for (int64_t c = 0; c < count; ++c) {
        V sum;
        for (int64_t m = 0; m < l.M; m += width) {
          const T* const dz = element(static_cast<const T*>(l.dz), l.N, range.begin + i + c, m);
          for_vectors<T>(std::min(width, l.M - m), [&](int64_t k, auto n) { sum = sum + load(dz + k, n); });
        }
        db[c] = sum_lanes(sum);
      }
      pointwise_of<T>().update(*l.update_b, range.begin + i, 0, {db, 0}, 1, count);
    });
  }
};

}  // namespace

namespace MLP_EXT_TARGET {

const PanelKernels* panel_kernels(DType dtype) {
  return dtype == DType::float32   ? &PanelSteps<float>::kernels
         : dtype == DType::float64 ? &PanelSteps<double>::kernels
                                   : nullptr;
}

}  // namespace MLP_EXT_TARGET
}  // namespace mlp_ext::cpu
