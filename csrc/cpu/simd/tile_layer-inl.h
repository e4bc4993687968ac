// A layer in bfloat16 on the tile unit of AMX. Each operand is packed once, with dz computed while packing; bias and
// activation, or the update of W, take blocks of sums in L1. Compiled once per instruction set.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/epilogue-inl.h"
#include "cpu/simd/pack-inl.h"
#include "cpu/simd/tile_pack-inl.h"
#include "cpu/simd/tile_unit-inl.h"

namespace mlp_ext::cpu {
namespace {

template <class Unit>
struct TileLayer {
  using S = BFloat16;
  static constexpr int64_t kBlockRows = 2 * kPanelSide;  // of sums in L1
  static constexpr int64_t kDepthInL1 = 8 * kPanelSide;  // of B: 16 KiB, read for both panels of A
  static constexpr int kSumsStride = kPanelSide;
  static constexpr int kRowVectors = kSumsStride / kLanes;
  // The workspace: sums, a panel of B and rows of x.
  static constexpr int64_t kSums = kTileRowsInL2 * kTileColumnsInL2;
  static constexpr int64_t kPanelOfPart = kPanelSide * kTileDepthInL2;
  static constexpr int64_t kPackedRows = kBlockRows * kTileDepth;
  static_assert(kSums * sizeof(float) + (kPanelOfPart + kPackedRows) * sizeof(S) <= kScratchBytes);
  static int lanes_of(int columns, int vector) { return std::clamp(columns - vector * kLanes, 0, kLanes); }

  // sums [32, 32] += A B for a panel each of A and B, over some steps of the depth. Row and column tiles past the edges
  // are left out.
  template <int row_tiles, int column_tiles>
  static void add_products(Unit& unit, const Bits16* a, const Bits16* b, int64_t steps, float* sums, bool from_zero,
                           Prefetcher& prefetcher) {
    constexpr int64_t stride = kSumsStride * sizeof(float);
    constexpr bool two_rows = row_tiles == 2, two_columns = column_tiles == 2;
    float *const right = sums + kTileSide, *const below = sums + kTileSide * kSumsStride;
    if (from_zero) {
      unit.template zero<0>(), unit.template zero<1>(), unit.template zero<2>(), unit.template zero<3>();
    } else {
      unit.template load<0>(sums, stride);
      if (two_columns) unit.template load<1>(right, stride);
      if (two_rows) unit.template load<2>(below, stride);
      if (two_rows && two_columns) unit.template load<3>(below + kTileSide, stride);
    }
    for (int64_t s = 0; s < steps; ++s, a += kStepElements, b += kStepElements) {
      prefetcher.issue();
      unit.template load<6>(b);
      unit.template stream<4>(a);
      unit.template dot<0, 4, 6>();
      if (two_columns) {
        unit.template load<7>(b + kTileElements);
        unit.template dot<1, 4, 7>();
      }
      if (two_rows) {
        unit.template stream<5>(a + kTileElements);
        unit.template dot<2, 5, 6>();
        if (two_columns) unit.template dot<3, 5, 7>();
      }
    }
    unit.template store<0>(sums, stride);
    if (two_columns) unit.template store<1>(right, stride);
    if (two_rows) unit.template store<2>(below, stride);
    if (two_rows && two_columns) unit.template store<3>(below + kTileSide, stride);
  }

  // A block of sums, [rows, 32] from (i, j) on, and how many of its rows the epilogue has taken.
  struct Block {
    int64_t i = 0, j = 0;
    int rows = 0, columns = 0, taken = 0;
    float* sums = nullptr;
  };
  template <class Finish>
  static void take_rows(Block& block, int count, const Finish& finish) {
    const int rows = std::min(count, block.rows - block.taken);
    if (rows > 0) finish(block.i + block.taken, block.j, block.sums + block.taken * kSumsStride, rows, block.columns);
    block.taken += rows;
  }

  // Panels of B: packed before, or packed when they are needed, if that is once.
  struct PackedBefore {
    const Bits16* panels;
    int64_t panel;  // elements
    const Bits16* part(int64_t j, int64_t k, int64_t, int64_t) const {
      return panels + j / kPanelSide * panel + k / kPanelSide * kStepElements;
    }
    void prefetch(int64_t j, int64_t k, int64_t depth, Prefetcher& prefetcher) const {
      prefetcher.enqueue(part(j, k, 0, 0), 256, ceil_div(depth, kPanelSide) * 8, 256);
    }
  };
  template <auto pack, bool transposed>
  struct PackedOnce {
    ConstMatrix m;  // B, or B^T
    Bits16* panel;  // of one part of the depth
    const Bits16* part(int64_t j, int64_t k, int64_t columns, int64_t depth) const {
      pack({transposed ? at<S>(m, j, k) : at<S>(m, k, j), m.stride}, {0, columns}, depth, panel);
      return panel;
    }
    void prefetch(int64_t, int64_t, int64_t, Prefetcher&) const {}  // no faster
  };

  // A B for panels of A [rows, depth], from their first on, and B [depth, columns]. A part of A stays in L2 while B
  // passes; its sums are in the workspace. The epilogue takes a block while the tile unit multiplies the next.
  //   finish.begin(i, j, sums, rows, columns)  writes sums so far, or returns false
  //   finish(i, j, sums, rows, columns)        takes sums
  template <class B, class Finish>
  static void multiply(const Bits16* a, const B& b, int64_t rows, int64_t columns, int64_t depth, float* workspace,
                       const Finish& finish) {
    Unit unit;
    Block before;
    int64_t blocks = 0;
    const int64_t panel = ceil_div(depth, kPanelSide) * kStepElements;
    const bool in_parts = depth > kTileDepthInL2;
    const auto part_of_depth = [&](int64_t i0, int64_t j0, int64_t k0) {
      const int64_t end_i = std::min(rows, i0 + kTileRowsInL2), end_j = std::min(columns, j0 + kTileColumnsInL2);
      const int64_t part = std::min(kTileDepthInL2, depth - k0), steps = ceil_div(part, kPanelSide);
      const bool last = k0 + part == depth;
      const int rows_at_once = static_cast<int>(ceil_div(kBlockRows, 2 * ceil_div(part, kDepthInL1)));
      if (in_parts) blocks = 0;
      for (int64_t j = j0; j < end_j; j += kPanelSide) {
        const Bits16* const b_part = b.part(j, k0, std::min(kPanelSide, columns - j), part);
        Prefetcher prefetcher;
        if (j + kPanelSide < columns) b.prefetch(j + kPanelSide, k0, part, prefetcher);
        prefetcher.pace(ceil_div(end_i - i0, kPanelSide) * steps);
        for (int64_t i = i0; i < end_i; i += kBlockRows) {
          Block block{i, j, static_cast<int>(std::min(kBlockRows, rows - i)),
                      static_cast<int>(std::min(kPanelSide, columns - j))};
          block.sums = workspace + (in_parts ? blocks++ : blocks++ % 2) * kBlockRows * kSumsStride;
          const bool has_sums = k0 > 0 || finish.begin(i, j, block.sums, block.rows, block.columns);
          for (int64_t k = 0; k < part; k += kDepthInL1)
            for (int r = 0; r < block.rows; r += kPanelSide) {
              const bool two_rows = block.rows - r > kTileSide, two_columns = block.columns > kTileSide;
              const auto add = two_rows ? (two_columns ? add_products<2, 2> : add_products<2, 1>)
                                        : (two_columns ? add_products<1, 2> : add_products<1, 1>);
              add(unit, a + (i + r) / kPanelSide * panel + (k0 + k) / kPanelSide * kStepElements,
                  b_part + k / kPanelSide * kStepElements, ceil_div(std::min(kDepthInL1, part - k), kPanelSide),
                  block.sums + r * kSumsStride, k == 0 && !has_sums, prefetcher);
              take_rows(before, rows_at_once, finish);
            }
          take_rows(before, kBlockRows, finish);
          if (last) before = block;
        }
      }
    };
    for (int64_t i0 = 0; i0 < rows; i0 += kTileRowsInL2)
      for (int64_t j0 = 0; j0 < columns; j0 += kTileColumnsInL2) {
        for (int64_t k0 = 0; k0 < depth; k0 += kTileDepthInL2) part_of_depth(i0, j0, k0);
        if (in_parts) take_rows(before, kBlockRows, finish);  // before its memory is used again
      }
    take_rows(before, kBlockRows, finish);
  }

  static PackedBefore before(const void* panels, int64_t depth, Range columns) {
    return {step_of(const_cast<void*>(panels), depth, columns.begin, 0), ceil_div(depth, kPanelSide) * kStepElements};
  }

  // y = act(x W^T + b)   (M,K)(K,N)
  template <class Act>
  struct FinishForward {
    const S* bias;  // or nullptr
    S* y;
    int64_t stride;
    bool past_caches;
    bool begin(int64_t, int64_t, float*, int, int) const { return false; }
    void operator()(int64_t i, int64_t j, const float* sums, int rows, int columns) const {
      Vec<float> biases[kRowVectors];
      for (int v = 0; bias && v < kRowVectors; ++v) biases[v] = load(bias + j + v * kLanes, lanes_of(columns, v));
      for (int r = 0; r < rows; ++r) {
        Vec<float> row[kRowVectors];
        for (int v = 0; v < kRowVectors; ++v) {
          const Vec<float> z = load(sums + r * kSumsStride + v * kLanes);
          row[v] = Act{}.forward(bias ? z + biases[v] : z);  // -0 stays without a bias
        }
        Unit::store_row(y + (i + r) * stride + j, row, columns, past_caches);
      }
    }
  };
  struct FinishForwardByTiles {
    BiasActTile<S, kSumsStride> tile;
    bool begin(int64_t, int64_t, float*, int, int) const { return false; }
    void operator()(int64_t i, int64_t j, float* sums, int rows, int columns) const {
      tile.tile(i, j, sums, rows, columns);
    }
  };
  static void forward(const Forward& f, const void* w_panels, Range rows, Range columns, void* scratch) {
    using Once = PackedOnce<pack_b_transposed, true>;
    const S* const bias = static_cast<const S*>(f.bias);
    S *const y = static_cast<S*>(f.y.data), *const z = static_cast<S*>(f.z.data);
    float* const workspace = static_cast<float*>(scratch);
    Bits16* const panel = reinterpret_cast<Bits16*>(workspace + kSums);
    Bits16* const x = panel + kPanelOfPart;
    const int64_t row = ceil_div(f.K, kPanelSide) * kPanelSide;
    const int64_t each = std::min(kTileRowsInL2, kPackedRows / row / kBlockRows * kBlockRows);
    for (int64_t m = rows.begin; m < rows.end; m += each) {
      const int64_t count = std::min(each, rows.end - m);
      pack_a(f.x, {m, m + count}, f.K, x);
      const auto run = [&](const auto& finish) {
        const auto with = [&](const auto& w) { multiply(x, w, count, columns.size(), f.K, workspace, finish); };
        w_panels ? with(before(w_panels, f.K, columns)) : with(Once{{at<S>(f.w, columns.begin, 0), f.w.stride}, panel});
      };
      with_act_in_registers(
          *f.activation,
          [&](auto act) {
            run(FinishForward<decltype(act)>{bias ? bias + columns.begin : nullptr, y + m * f.y.stride + columns.begin,
                                             f.y.stride, f.y_past_caches});
          },
          [&] {
            run(FinishForwardByTiles{
                BiasActTile<S, kSumsStride>{f.activation, bias, y, z, f.y.stride, f.z.stride, f.y_past_caches}.from(
                    m, columns.begin)});
          });
    }
    end_of_streams();
  }

  // dx = dz W   (M,N)(N,K)
  struct Store {
    S* out;
    int64_t stride;
    bool past_caches;
    bool begin(int64_t, int64_t, float*, int, int) const { return false; }
    void operator()(int64_t i, int64_t j, const float* sums, int rows, int columns) const {
      for (int r = 0; r < rows; ++r) {
        Vec<float> row[kRowVectors];
        for (int v = 0; v < kRowVectors; ++v) row[v] = load(sums + r * kSumsStride + v * kLanes);
        Unit::store_row(out + (i + r) * stride + j, row, columns, past_caches);
      }
    }
  };
  static void grad_input(const Backward& b, const void* dz_panels, const void* w_panels, Range rows, Range columns,
                         void* scratch) {
    using Once = PackedOnce<pack_b, false>;
    float* const workspace = static_cast<float*>(scratch);
    Bits16* const panel = reinterpret_cast<Bits16*>(workspace + kSums);
    const auto with = [&](const auto& w) {
      multiply(step_of(const_cast<void*>(dz_panels), b.N, rows.begin, 0), w, rows.size(), columns.size(), b.N,
               workspace, Store{at<S>(b.dx, rows.begin, columns.begin), b.dx.stride, b.dx_past_caches});
    };
    w_panels ? with(before(w_panels, b.N, columns)) : with(Once{{at<S>(b.w, 0, columns.begin), b.w.stride}, panel});
    end_of_streams();
  }

  // dW = dz^T x   (N,M)(M,K), over all samples in several calls
  struct FinishWeight {
    const Backward& b;
    Range rows, columns;
    float* partial;  // [N, K], or nullptr if there is one call
    bool first, last;

    float* partial_at(int64_t i, int64_t j) const { return partial + (rows.begin + i) * b.K + columns.begin + j; }
    // W and its states are read once, in short rows that the processor does not prefetch by itself.
    void prefetch(const void* data, int64_t offset, int n_rows, int n_columns) const {
      const S* row = static_cast<const S*>(data) + offset;
      for (int r = 0; data && r < n_rows; ++r, row += b.K) {
        __builtin_prefetch(row, 1);
        __builtin_prefetch(row + n_columns - 1, 1);
      }
    }
    bool begin(int64_t i, int64_t j, float* sums, int n_rows, int n_columns) const {
      if (last && b.update_w) {
        const int64_t offset = (rows.begin + i) * b.K + columns.begin + j;
        prefetch(b.update_w->parameter, offset, n_rows, n_columns);
        for (const void* state : b.update_w->states) prefetch(state, offset, n_rows, n_columns);
      }
      if (first) return false;
      for (int r = 0; r < n_rows; ++r)
        std::memcpy(sums + r * kSumsStride, partial_at(i + r, j), sizeof(float) * n_columns);
      return true;
    }
    void operator()(int64_t i, int64_t j, float* sums, int n_rows, int n_columns) const {
      const int64_t offset = (rows.begin + i) * b.K + columns.begin + j;
      if (!last)
        for (int r = 0; r < n_rows; ++r)
          std::memcpy(partial_at(i + r, j), sums + r * kSumsStride, sizeof(float) * n_columns);
      else if (b.update_w)
        pointwise_of<S>().update(*b.update_w, offset, b.K, {sums, kSumsStride}, n_rows, n_columns);
      else
        Store{static_cast<S*>(b.dw) + offset, b.K, false}(0, 0, sums, n_rows, n_columns);
    }
  };
  static void grad_weight(const Backward& b, const void* dz_t_panels, const void* x_panels, Range rows, Range columns,
                          float* partial, bool first, bool last, void* scratch) {
    multiply(step_of(const_cast<void*>(dz_t_panels), b.M, rows.begin, 0), before(x_panels, b.M, columns), rows.size(),
             columns.size(), b.M, static_cast<float*>(scratch), FinishWeight{b, rows, columns, partial, first, last});
  }

  static void round_db(const double* totals, int64_t N, float* db) { round_sums(totals, N, db); }

  static constexpr TileKernels kernels{pack_b_transposed, pack_b,      pack_grad<Unit>, forward,
                                       grad_input,        grad_weight, round_db};
};

}  // namespace

namespace MLP_EXT_TARGET {

const TileKernels& tile_kernels() {
#if MLP_EXT_VECTOR_BYTES == 64
  if (multiplies_tiles()) return TileLayer<TileUnit>::kernels;
#endif
  return TileLayer<PlainTileUnit>::kernels;
}

// As fma_loop, on four tiles of sums.
int64_t tile_loop(int64_t rounds) {
#if MLP_EXT_VECTOR_BYTES == 64
  if (!multiplies_tiles()) return 0;
  TileUnit unit;
  for (int64_t round = 0; round < rounds; ++round)
    unit.dot<0, 4, 6>(), unit.dot<1, 4, 7>(), unit.dot<2, 5, 6>(), unit.dot<3, 5, 7>();
  return rounds * 4 * 2 * kTileSide * kTileSide * 2 * kTileSide;
#else
  return 0 * rounds;
#endif
}

}  // namespace MLP_EXT_TARGET
}  // namespace mlp_ext::cpu
