// Packing for the tile unit. Operands are panels of 32 rows of A or 32 columns of B; in a panel, each 32 of the depth
// are two tiles, one after the other. A tile of A is 16 rows of 32 numbers, a tile of B 16 pairs of rows by 16 columns.
// Past the edges are zeros.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/epilogue-inl.h"
#include "cpu/simd/pack-inl.h"
#include "cpu/simd/row_sums-inl.h"
#include "cpu/simd/tile_unit-inl.h"

namespace mlp_ext::cpu {
namespace {

using Bits16 = uint16_t;
constexpr int64_t kStepElements = 2 * kTileElements;  // of a panel, per kPanelSide of the depth

// The two tiles of a panel at a depth.
inline Bits16* step_of(void* panels, int64_t depth, int64_t line, int64_t k) {
  return static_cast<Bits16*>(panels) +
         (line / kPanelSide * ceil_div(depth, kPanelSide) + k / kPanelSide) * kStepElements;
}

inline Vec<float> load_pairs(const Bits16* p) {
  Vec<float> v;
  std::memcpy(&v.v, p, sizeof(v.v));
  return v;
}

typedef uint16_t Row16 __attribute__((vector_size(kVectorBytes)));
inline Row16 load_row(const Bits16* p) {
  Row16 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
// Pairs of the lanes of two rows: those of the first half, and those of the second.
inline std::array<Row16, 2> interleave(Row16 a, Row16 b) {
  constexpr int lanes = 2 * kLanes;
  Row16 first{}, second{};
#pragma GCC unroll 32
  for (int l = 0; l < lanes; ++l) {
    first[l] = static_cast<uint16_t>(l / 2 + l % 2 * lanes);
    second[l] = static_cast<uint16_t>((l + lanes) / 2 + l % 2 * lanes);
  }
  return {shuffle(a, b, first), shuffle(a, b, second)};
}

// Stores the transpose of a tile's 16 rows of 16 pairs; row(r) is a pointer.
template <class Row>
inline void transpose_tile(const Row& row, Bits16* tile) {
  for (int r = 0; r < kTileSide; r += kLanes)
    for (int c = 0; c < kTileSide; c += kLanes) {
      Vec<float> square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = load_pairs(row(r + i) + 2 * c);
      transpose(square);
      for (int i = 0; i < kLanes; ++i) std::memcpy(tile + (c + i) * 2 * kTileSide + 2 * r, &square[i].v, kVectorBytes);
    }
}

// A step's rows and depth from a matrix: in place, or, at the edges, copied to a buffer and padded with zeros.
class StepRows {
 public:
  StepRows(const ConstMatrix& m, int64_t i, int64_t rows, int64_t j, int64_t columns) {
    const auto* const from = static_cast<const Bits16*>(m.data) + i * m.stride + j;
    if (rows >= kPanelSide && columns >= kPanelSide) {
      data_ = from;
      stride_ = m.stride;
      return;
    }
    std::memset(copy_, 0, sizeof(copy_));
    for (int64_t r = 0; r < std::min(rows, kPanelSide); ++r)
      std::memcpy(copy_[r], from + r * m.stride, 2 * std::min(columns, kPanelSide));
    data_ = copy_[0];
    stride_ = kPanelSide;
  }
  const Bits16* row(int64_t r) const { return data_ + r * stride_; }

 private:
  const Bits16* data_;
  int64_t stride_;
  Bits16 copy_[kPanelSide][kPanelSide];
};

// A = m [lines, depth]
inline void pack_a(const ConstMatrix& m, Range lines, int64_t depth, void* panels) {
  for (int64_t i = lines.begin; i < lines.end; i += kPanelSide)
    for (int64_t k = 0; k < depth; k += kPanelSide) {
      const StepRows rows(m, i, lines.end - i, k, depth - k);
      Bits16* const step = step_of(panels, depth, i - lines.begin, k);
      for (int64_t r = 0; r < kPanelSide; ++r) std::memcpy(step + r * kPanelSide, rows.row(r), 2 * kPanelSide);
    }
}

// B = m^T for m [lines, depth]
inline void pack_b_transposed(const ConstMatrix& m, Range lines, int64_t depth, void* panels) {
  for (int64_t j = lines.begin; j < lines.end; j += kPanelSide)
    for (int64_t k = 0; k < depth; k += kPanelSide) {
      const StepRows rows(m, j, lines.end - j, k, depth - k);
      Bits16* const step = step_of(panels, depth, j, k);
      for (int64_t tile = 0; tile < 2; ++tile)
        transpose_tile([&](int64_t r) { return rows.row(kTileSide * tile + r); }, step + tile * kTileElements);
    }
}

// B = m [depth, lines]
inline void pack_b(const ConstMatrix& m, Range lines, int64_t depth, void* panels) {
  for (int64_t k = 0; k < depth; k += kPanelSide)
    for (int64_t j = lines.begin; j < lines.end; j += kPanelSide) {
      const StepRows rows(m, k, depth - k, j, lines.end - j);
      Bits16* const step = step_of(panels, depth, j, k);
      for (int64_t p = 0; p < kTileSide; ++p)
        for (int64_t c = 0; c < kPanelSide; c += 2 * kLanes) {
          const auto pairs = interleave(load_row(rows.row(2 * p) + c), load_row(rows.row(2 * p + 1) + c));
          for (int64_t half = 0; half < 2; ++half) {
            const int64_t column = c + half * kLanes;
            std::memcpy(step + column / kTileSide * kTileElements + 2 * (p * kTileSide + column % kTileSide),
                        &pairs[half], kVectorBytes);
          }
        }
    }
}

// dz of all rows and some columns n: A = dz and A = dz^T, either of which may be nullptr; adds db to totals [N], if
// given.
template <class Unit>
void pack_grad(const Backward& b, Range columns, void* dz_panels, void* dz_t_panels, double* totals) {
  constexpr int64_t width = 4 * kPanelSide;
  alignas(kVectorBytes) float dz[kPanelSide][width];
  alignas(kVectorBytes) Bits16 pairs[kTileSide][2 * width];  // of rows
  for (int64_t m = 0; m < b.M; m += kPanelSide) {
    const int64_t rows = std::min(kPanelSide, b.M - m);
    for (int64_t n = columns.begin; n < columns.end; n += width) {
      const int64_t count = std::min(width, columns.end - n), padded = ceil_div(count, kPanelSide) * kPanelSide;
      alignas(kVectorBytes) float db[width] = {};
      if (rows < kPanelSide || count < padded) std::memset(dz, 0, sizeof(dz));
      grad_z_rows<BFloat16>(b, {m, m + rows}, {n, n + count}, dz[0], width, totals ? db : nullptr);
      if (totals) add_up(totals + n, db, count);
      for (int64_t c = 0; dz_panels && c < padded; c += kPanelSide) {
        Bits16* const step = step_of(dz_panels, b.N, m, n + c);
        for (int64_t r = 0; r < kPanelSide; ++r) {
          Vec<float> row[kPanelSide / kLanes];
          for (int64_t l = 0; l < kPanelSide; l += kLanes) row[l / kLanes] = load(dz[r] + c + l);
          Unit::store_row(reinterpret_cast<BFloat16*>(step + r * kPanelSide), row, kPanelSide, false);
        }
      }
      if (!dz_t_panels) continue;
      for (int64_t p = 0; p < kTileSide; ++p)
        for (int64_t c = 0; c < padded; c += kLanes) {
          const U32 both = Unit::pairs(load(dz[2 * p] + c), load(dz[2 * p + 1] + c));
          std::memcpy(pairs[p] + 2 * c, &both, kVectorBytes);
        }
      for (int64_t c = 0; c < padded; c += kTileSide)
        transpose_tile([&](int64_t p) { return pairs[p] + 2 * c; },
                       step_of(dz_t_panels, b.M, n + c, m) + c / kTileSide % 2 * kTileElements);
    }
  }
}

}  // namespace
}  // namespace mlp_ext::cpu
