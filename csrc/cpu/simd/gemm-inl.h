// A blocked, single-threaded GEMM C = A B (Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication").
// Callers supply the packing of A and B, which may hold a prologue (dz from dy and y), and an epilogue that takes each
// vector of C while it is in a register (bias, activation, rounding).
#pragma once

#include "cpu/simd/vec-inl.h"

namespace mlp_ext::cpu {
namespace {

#if defined(__aarch64__)
constexpr int kTileRows = 10;  // 32 registers; GCC first loads a column of A, so that 11 rows spill accumulators
#else
constexpr int kTileRows = kVectorBytes == 64 ? 14 : 6;  // leaves 4 of 32 or 16 registers for A and B
#endif

template <class T>
struct Tile {  // register blocking: rows x vectors accumulators
  static constexpr int rows = kTileRows;
  static constexpr int vectors = 2;
  static constexpr int columns = vectors * Vec<T>::lanes;
};

template <class T>
struct Blocking {  // cache blocking (zen4, 1024x1024x1024)
  static constexpr int depth = kDepthBytes / sizeof(T);
  static constexpr int rows = 8 * Tile<T>::rows;         // A: a quarter of L2; more is no faster
  static constexpr int columns = 32 * Tile<T>::columns;  // B: at most; see Limits::block_bytes
};

// Layouts of A: element (i, k) is at row(i) + k * depth_step, and rows of a tile are row_step apart.
template <class T>
struct RowsOfA {  // row-major; the stride of packed rows is not a power of two
  static constexpr int depth_step = 1, packed_step = Blocking<T>::depth + Vec<T>::lanes;
  int64_t row_step = packed_step;
  int64_t row(int64_t i) const { return i * row_step; }
};
template <class T>
struct ColumnsOfA {  // depth-major panels
  static constexpr int row_step = 1;
  static constexpr int depth_step = (Tile<T>::rows + Vec<T>::lanes - 1) / Vec<T>::lanes * Vec<T>::lanes;
  static constexpr int64_t panel = Blocking<T>::depth * depth_step;
  static int64_t row(int64_t i) { return i / Tile<T>::rows * panel + i % Tile<T>::rows; }
};
template <class T>
struct RowsOfATransposed {  // reads packed RowsOfA as its transpose
  static constexpr int row_step = 1, depth_step = RowsOfA<T>::packed_step;
  static int64_t row(int64_t i) { return i; }
};

template <class T>
constexpr int64_t kPackedA = Blocking<T>::rows / Tile<T>::rows *
                             std::max<int64_t>(Tile<T>::rows * RowsOfA<T>::packed_step, ColumnsOfA<T>::panel);
template <class T>
constexpr int64_t kPackedB = Blocking<T>::depth * Blocking<T>::columns;

constexpr int64_t kDepthToPrefetch = 256;  // depth of a tile that hides the latency of its partial sums
constexpr int64_t kPageBytes = 4096;       // also the distance of addresses that share an L1 set
constexpr int64_t kBytesInL1 = 16384;      // half of the usual 32 KiB
constexpr int kWaysOfL1 = 8;               // addresses that share a set and stay in L1

// A block of B as panels of Tile::columns columns.
template <class T>
struct Panels {
  const T* data;
  int64_t depth_step, panel_step;

  static Panels packed(const T* data, int64_t depth) { return {data, Tile<T>::columns, depth * Tile<T>::columns}; }
  static Panels in_place(const T* data, int64_t stride) { return {data, stride, Tile<T>::columns}; }
  Panels from(int64_t k, int64_t j) const {
    return {data + k * depth_step + j / Tile<T>::columns * panel_step, depth_step, panel_step};
  }
};

// Where partial sums are kept between depth blocks: in the result, or in the workspace if the result has 16 bits.
template <class T>
struct Partial {
  T* data;
  int64_t row_stride;
  int64_t panel_step = Tile<T>::columns;
  bool starts_over = false;  // the memory is reused for every block of columns

  T* at(int64_t i, int64_t j) const { return data + i * row_stride + j / Tile<T>::columns * panel_step; }
};

// Position of a depth block: all but the first add the partial sums so far, the last one runs the epilogue.
struct Stage {
  bool first, last;
};

// Software prefetch of the next block, a few cache lines per tile, so that loads overlap with FMAs.
class Prefetcher {
 public:
  // rows of `bytes` each
  void enqueue(const void* data, int64_t stride_bytes, int64_t rows, int64_t bytes) {
    if (data && rows > 0)
      parts_[count_++] = {static_cast<const char*>(data), stride_bytes, rows, ceil_div(bytes, kLine)};
  }
  void pace(int64_t steps) {
    int64_t lines = 0;
    for (int i = 0; i < count_; ++i) lines += parts_[i].rows * parts_[i].lines;
    lines_per_step_ = ceil_div(lines, std::max<int64_t>(1, steps));
  }
  void issue() {
    for (int64_t lines = lines_per_step_; lines > 0 && count_ > 0;) {
      Part& part = parts_[count_ - 1];
      for (int64_t l = 0; l < part.lines; ++l) __builtin_prefetch(part.row + l * kLine, 0, 2);
      lines -= part.lines;
      part.row += part.stride;
      if (--part.rows == 0) --count_;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  struct Part {
    const char* row;
    int64_t stride, rows, lines;
  };
  Part parts_[3] = {};
  int count_ = 0;
  int64_t lines_per_step_ = 0;
};

// A function reference, so that the loops are compiled once for all packings.
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
using PackA = Callable<void(int64_t i, int64_t rows, int64_t k, int64_t depth, bool first_columns, T* packed,
                            Prefetcher& prefetcher)>;
template <class T>
using PackB = Callable<void(int64_t k, int64_t depth, int64_t j, int64_t columns, T* packed)>;

// Element types of packed A and B: how a vector of them is read and accumulated.
template <class T>
struct Single {  // one number, accumulated by FMA
  static constexpr int depth = 1;
  template <class S, class Lanes>
  static Vec<T> read(const S* p, Lanes lanes) {
    return load(p, lanes);
  }
  static Vec<T> accumulate(Vec<T> sum, Vec<T> a, Vec<T> b) { return sum + a * b; }
};
#if MLP_EXT_VECTOR_BYTES == 64
struct Bfloat16Pair {  // two bfloat16 in 32 bits, accumulated by VDPBF16PS
  static constexpr int depth = 2;
  static Vec<float> read(const BFloat16* p, AllLanes) { return Vec<float>((Vec<float>::Native)_mm512_loadu_ps(p)); }
  static Vec<float> read(const BFloat16* p, int n) {  // 1 to 32 numbers
    return Vec<float>(bit_cast<Vec<float>::Native>(_mm512_maskz_loadu_epi16(~uint32_t(0) >> (32 - n), p)));
  }
  static Vec<float> accumulate(Vec<float> sum, Vec<float> a, Vec<float> b) {
    return Vec<float>(
        (Vec<float>::Native)_mm512_dpbf16_ps((__m512)sum.v, bit_cast<__m512bh>(a.v), bit_cast<__m512bh>(b.v)));
  }
};
#endif

// Micro-kernel: R rows of A by V vectors of B, the last with `lanes` lanes. Calls out(row, column, vector, lanes).
template <class Layout, class Element, int R, int V, class T, class Lanes, class Out>
__attribute__((noinline)) void multiply(const T* __restrict__ a, const T* __restrict__ b, int64_t b_step, int64_t depth,
                                        Layout layout, Lanes lanes, const Out out) {
  Vec<T> acc[R][V];
  for (int64_t k = 0; k < depth; ++k, a += Layout::depth_step, b += b_step) {
    Vec<T> bk[V];
#pragma GCC unroll 4
    for (int v = 0; v < V - 1; ++v) bk[v] = load(b + v * Vec<T>::lanes);
    bk[V - 1] = load(b + (V - 1) * Vec<T>::lanes, lanes);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const Vec<T> ai = a[i * layout.row_step];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[i][v] = Element::accumulate(acc[i][v], ai, bk[v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) out(i, v * Vec<T>::lanes, acc[i][v], AllLanes{});
}

// Stores a tile's sums to a buffer [R, Tile::columns].
template <class T>
struct StoreTile {
  T* __restrict__ sums;
  void operator()(int row, int column, Vec<T> v, AllLanes) const { store(sums + row * Tile<T>::columns + column, v); }
};

// Calls f(row, column, vector, lanes) for all sums of a tile.
template <int stride = 0, class T, class F>
inline void for_sums(const T* sums, int rows, int width, const F& f) {
  constexpr int lanes = Vec<T>::lanes;
  for (int r = 0; r < rows; ++r, sums += stride ? stride : Tile<T>::columns) {
    int c = 0;
    for (; c + lanes <= width; c += lanes) f(r, c, load(sums + c), AllLanes{});
    if (c < width) f(r, c, load(sums + c), width - c);
  }
}

// Passes a tile's sums, still in L1, to the epilogue or to the partial sums. finish(i, j, vector, lanes) takes complete
// sums; with Finish::whole_depth all sums are complete.
template <class T, class Finish>
inline void pass_on(const T* sums, int rows, int width, int64_t i, int64_t j, Stage stage, Partial<T> partial,
                    const Finish finish) {
  if (Finish::whole_depth || (stage.first && stage.last))
    return for_sums(sums, rows, width, [&](int r, int c, Vec<T> v, auto lanes) { finish(i + r, j + c, v, lanes); });
  if constexpr (!Finish::whole_depth) {
    T* const sums_so_far = partial.at(i, j);
    const int64_t stride = partial.row_stride;
    if (stage.last)
      for_sums(sums, rows, width, [&](int r, int c, Vec<T> v, auto lanes) {
        finish(i + r, j + c, v + load(sums_so_far + r * stride + c, lanes), lanes);
      });
    else if (stage.first)
      for_sums(sums, rows, width,
               [&](int r, int c, Vec<T> v, auto lanes) { store(sums_so_far + r * stride + c, v, lanes); });
    else
      for_sums(sums, rows, width, [&](int r, int c, Vec<T> v, auto lanes) {
        store(sums_so_far + r * stride + c, v + load(sums_so_far + r * stride + c, lanes), lanes);
      });
  }
}

// Epilogues that take tiles rather than vectors: finish.tile(i, j, sums [rows, Tile::columns], rows, width).
template <class Finish>
constexpr bool takes_tiles = requires { Finish::takes_tiles; };

template <class T, class Finish>
__attribute__((noinline)) void pass_on_tile(T* sums, int rows, int width, int64_t i, int64_t j, Stage stage,
                                            Partial<T> partial, const Finish& finish) {
  if (!Finish::whole_depth && !(stage.first && stage.last)) {
    T* const sums_so_far = partial.at(i, j);
    const int64_t stride = partial.row_stride;
    T* const to = stage.last ? sums : sums_so_far;
    const int64_t to_stride = stage.last ? Tile<T>::columns : stride;
    for_sums(sums, rows, width, [&](int r, int c, Vec<T> v, auto lanes) {
      if (!stage.first) v = v + load(sums_so_far + r * stride + c, lanes);
      store(to + r * to_stride + c, v, lanes);
    });
    if (!stage.last) return;
  }
  finish.tile(i, j, sums, rows, width);
}

// pass_on out of line for edge tiles: compiled once for all heights.
template <class T, class Finish>
__attribute__((noinline)) void pass_on_edge(const T* sums, int rows, int width, int64_t i, int64_t j, Stage stage,
                                            Partial<T> partial, const Finish& finish) {
  pass_on(sums, rows, width, i, j, stage, partial, finish);
}

// Epilogue that only rounds and stores.
template <class S>
struct StoreSums {
  static constexpr bool whole_depth = false;
  S* result;
  int64_t stride;
  bool past_caches = false;
  StoreSums from(int64_t i, int64_t j) const { return {result + i * stride + j, stride, past_caches}; }
  template <class V, class Lanes>
  void operator()(int64_t i, int64_t j, V v, Lanes lanes) const {
    store_result(result + i * stride + j, v, lanes, past_caches);
  }
};

// A packed block of A times a block of B: full tiles of rows, then ever smaller tiles for the remaining rows.
template <class Layout, class Element, int R, class T, class Finish>
inline void tiles(const T* a, Panels<T> b, int64_t depth, int64_t i, int64_t rows, int64_t columns, Stage stage,
                  Partial<T> partial, const Finish finish, Prefetcher& prefetcher, Layout layout = {}) {
  constexpr int whole = Tile<T>::rows, lanes = Vec<T>::lanes;
  static_assert(Tile<T>::vectors == 2);
  const bool complete = Finish::whole_depth || (stage.first && stage.last);
  alignas(kVectorBytes) T sums[R * Tile<T>::columns];
  for (; i + R <= rows; i += R) {  // a panel of A stays in L1 while those of B stream past
    const T* const ai = a + layout.row(i);
    const T* bj = b.data;
    for (int64_t j = 0; j < columns; j += Tile<T>::columns, bj += b.panel_step) {
      const int width = static_cast<int>(std::min<int64_t>(Tile<T>::columns, columns - j));
      prefetcher.issue();
      if constexpr (!takes_tiles<Finish> && (R == whole || Finish::whole_depth))
        if (complete && width == Tile<T>::columns) {  // epilogue in registers
          multiply<Layout, Element, R, 2>(ai, bj, b.depth_step, depth, layout, AllLanes{}, finish.from(i, j));
          continue;
        }
      if (depth >= kDepthToPrefetch && !complete)
        for (int r = 0; r < R; ++r)
          for (int v = 0; v < Tile<T>::vectors; ++v) __builtin_prefetch(partial.at(i + r, j) + v * lanes, 1);
      const StoreTile<T> store{sums};
      if (width == Tile<T>::columns)
        multiply<Layout, Element, R, 2>(ai, bj, b.depth_step, depth, layout, AllLanes{}, store);
      else if (width > lanes)
        multiply<Layout, Element, R, 2>(ai, bj, b.depth_step, depth, layout, width - lanes, store);
      else
        multiply<Layout, Element, R, 1>(ai, bj, b.depth_step, depth, layout, width, store);
      if constexpr (takes_tiles<Finish>)
        pass_on_tile(sums, R, width, i, j, stage, partial, finish);
      else if constexpr (R == whole)
        pass_on(sums, R, width, i, j, stage, partial, finish);
      else
        pass_on_edge(sums, R, width, i, j, stage, partial, finish);
    }
  }
  constexpr int next = R == whole ? (whole > 8 ? 8 : 4) : R / 2;
  if constexpr (next > 0)
    if (i < rows)
      tiles<Layout, Element, next>(a, b, depth, i, rows, columns, stage, partial, finish, prefetcher, layout);
}

// to += from, [rows, columns] each
template <class T>
__attribute__((noinline)) void add_block(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t rows,
                                         int64_t columns) {
  for (int64_t i = 0; i < rows; ++i)
    for_vectors<T>(columns, [&](int64_t j, auto lanes) {
      T* const at = to + i * to_stride + j;
      store(at, load(at, lanes) + load(from + i * from_stride + j, lanes), lanes);
    });
}
constexpr int64_t kBlocksPerSum = 256;  // short depth blocks; the sums of more are added up

// C[rows, columns] = A[rows, depth] B[depth, columns], depth counted in packed Elements.
//   pack_a      (i, rows, k, depth, first_columns, packed, prefetcher): packs a block of A as Layout; may enqueue what
//               is read next
//   pack_b      (k, depth, j, columns, packed): packs B as panels [depth, Tile::columns]
//   b           B in place if it need not be packed, else data = nullptr
//   finish      epilogue (i, j, vector, lanes) for sums from (i, j) along row i; finish.from(i, j) is that of the block
//               that begins there. A copy, so that its pointers stay in registers although stores may alias.
//   block_rows  rows of A packed at a time
//   block_bytes of B packed at a time
//   a, layout   A in place if it need not be packed, else nullptr
template <class Layout, class Element, class T, class Finish>
void gemm(int64_t rows, int64_t columns, int64_t depth, PackA<T> pack_a, PackB<T> pack_b, Panels<T> b,
          Partial<T> partial, const Finish& finish, T* scratch, int64_t block_rows = Blocking<T>::rows,
          int64_t block_bytes = kMostBlockBytes, const T* a = nullptr, Layout layout = {}) {
  using Block = Blocking<T>;
  T* const packed_a = scratch;
  T* const packed_b = scratch + kPackedA<T>;
  const int64_t tiles_in_block = block_bytes / kDepthBytes / Tile<T>::columns;
  const int64_t block_columns =
      std::clamp<int64_t>(tiles_in_block * Tile<T>::columns, Tile<T>::columns, Block::columns);
  for (int64_t j0 = 0; j0 < columns; j0 += block_columns) {
    const int64_t nc = std::min(block_columns, columns - j0);
    // B in place: short depth blocks that fit L1, so that its rows are read sequentially.
    const int64_t in_l1 = std::max<int64_t>(8, kBytesInL1 / static_cast<int64_t>(sizeof(T)) / nc);
    const bool in_rows = b.data && b.panel_step == Tile<T>::columns;
    const int64_t step = in_rows ? std::min<int64_t>(in_l1, Block::depth) : Block::depth;
    const int64_t depth_of_sum = kBlocksPerSum * step;
    T* const totals = packed_b;  // [rows, nc], if B is in place
    int64_t k0 = 0;
    do {  // at least once: with depth 0 the epilogue still runs, on zeros
      const int64_t kc = std::min<int64_t>(step, depth - k0);
      const bool last = k0 + kc == depth, starts_over = in_rows && !last && k0 > 0 && k0 % depth_of_sum == 0;
      if (starts_over) {
        if (k0 == depth_of_sum) std::fill(totals, totals + rows * nc, T(0));
        add_block(partial.at(0, j0), partial.row_stride, totals, nc, rows, nc);
      } else if (in_rows && last && k0 > depth_of_sum) {
        add_block(totals, nc, partial.at(0, j0), partial.row_stride, rows, nc);
      }
      if (kc && !b.data) pack_b(k0, kc, j0, nc, packed_b);
      const auto panels = b.data ? b.from(k0, j0) : Panels<T>::packed(packed_b, kc);
      for (int64_t i0 = 0; i0 < rows; i0 += block_rows) {
        const int64_t mc = std::min(block_rows, rows - i0);
        Prefetcher prefetcher;
        if (kc && !a) pack_a(i0, mc, k0, kc, j0 == 0, packed_a, prefetcher);
        const T* const block = a ? a + layout.row(i0) + k0 * Layout::depth_step : packed_a;
        prefetcher.pace(ceil_div(mc, Tile<T>::rows) * ceil_div(nc, Tile<T>::columns));
        const Partial<T> sums_so_far{partial.at(i0, partial.starts_over ? 0 : j0), partial.row_stride,
                                     partial.panel_step};
        tiles<Layout, Element, Tile<T>::rows>(block, panels, kc, 0, mc, nc, Stage{k0 == 0 || starts_over, last},
                                              sums_so_far, finish.from(i0, j0), prefetcher, layout);
      }
      k0 += kc;
    } while (k0 < depth);
  }
  end_of_streams();
}

}  // namespace
}  // namespace mlp_ext::cpu
