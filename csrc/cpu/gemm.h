// A blocked product C = A B for one thread (Goto and van de Geijn, "Anatomy of High-Performance Matrix
// Multiplication"). The callers pack A and B, which is where a prologue goes (dz from dy and y), and finish each vector
// of C while it is in a register, which is where an epilogue goes (bias, activation, rounding).
#pragma once

#include "cpu/vec.h"

namespace mlp_ext::cpu {
namespace {

template <class T>
struct Tile {  // what one pass of the inner loop holds in registers: rows x vectors accumulators
  static constexpr int rows = kVectorBytes == 64 ? 14 : 6;  // of 32 or 16 registers, 2 or 3 are left for A and B
  static constexpr int vectors = 2;
  static constexpr int columns = vectors * Vec<T>::lanes;
};

template <class T>
struct Blocking {                                 // the loops around it, measured at 1024x1024x1024 on Zen 4:
  static constexpr int depth = 2048 / sizeof(T);  // 102 GFLOP/s; with 1024 bytes 98, sums are written twice as often
  static constexpr int rows = 8 * Tile<T>::rows;  // A: a quarter of L2; 16 tiles are no faster
  static constexpr int columns = 32 * Tile<T>::columns;  // B: with 16 tiles 97, A is packed twice as often
};

// How a block of A lies when packed: element (i, k) at panel(i) + (i % rows) * row_step + k * depth_step.
template <class T>
struct RowsOfA {  // as in memory, a copy of rows; the stride is no power of two
  static constexpr int row_step = Blocking<T>::depth + Vec<T>::lanes, depth_step = 1;
  static constexpr int64_t panel = Tile<T>::rows * row_step;
};
template <class T>
struct ColumnsOfA {  // transposed, a copy of short pieces of rows of A^T
  static constexpr int row_step = 1;
  static constexpr int depth_step = (Tile<T>::rows + Vec<T>::lanes - 1) / Vec<T>::lanes * Vec<T>::lanes;
  static constexpr int64_t panel = Blocking<T>::depth * depth_step;
};

template <class T>
constexpr int64_t kPackedA = Blocking<T>::rows / Tile<T>::rows * std::max(RowsOfA<T>::panel, ColumnsOfA<T>::panel);
template <class T>
constexpr int64_t kPackedB = Blocking<T>::depth * Blocking<T>::columns;

// Sums that wait for the next block of depth: the result itself, or a scratch block where it has fewer bits.
template <class T>
struct Partial {
  T* data;
  int64_t row_stride, column_stride;  // column_stride 0: every block of columns starts over
};

// A callable by reference, so that the loops are compiled once for all packings.
template <class Signature>
class Callable;
template <class... Args>
class Callable<void(Args...)> {
 public:
  template <class F>
  Callable(const F& f)
      : object_(&f), call_([](const void* object, Args... args) { (*static_cast<const F*>(object))(args...); }) {}
  void operator()(Args... args) const { call_(object_, args...); }

 private:
  const void* object_;
  void (*call_)(const void*, Args...);
};
template <class T>
using PackA = Callable<void(int64_t i, int64_t rows, int64_t k, int64_t depth, bool first_columns, T* packed)>;
template <class T>
using PackB = Callable<void(int64_t k, int64_t depth, int64_t j, int64_t columns, T* packed)>;

// acc = A B for R rows and one panel of B.  a: panel of A from its row on,  b: [depth, Tile::columns]
template <class Layout, int R, class T>
inline void multiply(const T* __restrict__ a, const T* __restrict__ b, int64_t depth,
                     Vec<T> (&acc)[R][Tile<T>::vectors]) {
  for (int64_t k = 0; k < depth; ++k, a += Layout::depth_step, b += Tile<T>::columns) {
    Vec<T> bk[Tile<T>::vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Tile<T>::vectors; ++v) bk[v] = load(b + v * Vec<T>::lanes);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const Vec<T> ai = a[i * Layout::row_step];
#pragma GCC unroll 4
      for (int v = 0; v < Tile<T>::vectors; ++v) acc[i][v] = acc[i][v] + ai * bk[v];
    }
  }
}

// The tile of R rows at row i, column j of a block.  finish(i, j, vector, lanes) takes what is complete.
template <class Layout, int R, class T, class Finish>
inline void tile(const T* a, const T* b, int64_t depth, int64_t i, int64_t j, int64_t columns, bool first, bool last,
                 Partial<T> partial, const Finish& finish) {
  constexpr int lanes = Vec<T>::lanes;
  const auto pass_on = [&](int row, int column, Vec<T> sums, auto n) {
    T* const waiting = partial.data + (i + row) * partial.row_stride + j + column;
    if (!first) sums = sums + load(waiting, n);
    if (last)
      finish(i + row, j + column, sums, n);
    else
      store(waiting, sums, n);
  };
  Vec<T> acc[R][Tile<T>::vectors];
  multiply<Layout, R>(a, b, depth, acc);
  if (R == Tile<T>::rows && columns - j >= Tile<T>::columns) {  // whole: straight from the registers
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < Tile<T>::vectors; ++v) pass_on(r, v * lanes, acc[r][v], AllLanes{});
    return;
  }
  alignas(kVectorBytes) T sums[R][Tile<T>::columns];  // an edge: less code
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Tile<T>::vectors; ++v) store(&sums[r][v * lanes], acc[r][v]);
  const int width = static_cast<int>(std::min<int64_t>(Tile<T>::columns, columns - j));
#pragma GCC unroll 1
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 1
    for (int c = 0; c < width; c += lanes) pass_on(r, c, load(&sums[r][c]), std::min(lanes, width - c));
}

// A block of A against a block of B: whole tiles of rows, then halves of what is left.
template <class Layout, int R, class T, class Finish>
inline void tiles(const T* a, const T* b, int64_t depth, int64_t i, int64_t rows, int64_t columns, bool first,
                  bool last, Partial<T> partial, const Finish& finish) {
  constexpr int whole = Tile<T>::rows;
  for (; i + R <= rows; i += R) {  // a panel of A stays in L1 while those of B stream past
    const T* const ai = a + i / whole * Layout::panel + i % whole * Layout::row_step;
    for (int64_t j = 0; j < columns; j += Tile<T>::columns)
      tile<Layout, R>(ai, b + j * depth, depth, i, j, columns, first, last, partial, finish);
  }
  constexpr int next = R == whole ? (whole > 8 ? 8 : 4) : R / 2;
  if constexpr (next > 0)
    if (i < rows) tiles<Layout, next>(a, b, depth, i, rows, columns, first, last, partial, finish);
}

// C[rows, columns] = A[rows, depth] B[depth, columns].
//   pack_a(i, rows, k, depth, first_columns, packed)  puts a block of A down in Layout
//   pack_b(k, depth, j, columns, packed)              puts panels [depth, Tile::columns] down, zeros beyond the edge
//   finish(i, j, vector, lanes)                       stores sums of C at row i from column j on
template <class Layout, class T, class Finish>
void gemm(int64_t rows, int64_t columns, int64_t depth, PackA<T> pack_a, PackB<T> pack_b, Partial<T> partial,
          const Finish& finish, T* scratch) {
  using Block = Blocking<T>;
  T* const a = scratch;
  T* const b = scratch + kPackedA<T>;
  for (int64_t j0 = 0; j0 < columns; j0 += Block::columns) {
    const int64_t nc = std::min<int64_t>(Block::columns, columns - j0);
    const Partial<T> waiting{partial.data + j0 * partial.column_stride, partial.row_stride, partial.column_stride};
    int64_t k0 = 0;
    do {  // once at least: with no depth at all, C is zero before the epilogue
      const int64_t kc = std::min<int64_t>(Block::depth, depth - k0);
      const bool first = k0 == 0, last = k0 + kc == depth;
      pack_b(k0, kc, j0, nc, b);
      for (int64_t i0 = 0; i0 < rows; i0 += Block::rows) {
        const int64_t mc = std::min<int64_t>(Block::rows, rows - i0);
        pack_a(i0, mc, k0, kc, j0 == 0, a);
        const Partial<T> block{waiting.data + i0 * partial.row_stride, partial.row_stride, 0};
        const auto finish_block = [&](int64_t i, int64_t j, Vec<T> v, auto n) { finish(i0 + i, j0 + j, v, n); };
        tiles<Layout, Tile<T>::rows>(a, b, kc, 0, mc, nc, first, last, block, finish_block);
      }
      k0 += kc;
    } while (k0 < depth);
  }
}

}  // namespace
}  // namespace mlp_ext::cpu
