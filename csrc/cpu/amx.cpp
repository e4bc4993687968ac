// A layer in bfloat16 on the tile unit: threads pack the operands together, then multiply.
#include "cpu/amx.h"

#include <ATen/core/Tensor.h>

#include "cpu/caching_allocator.h"
#include "cpu/layer.h"
#include "cpu/variants.h"

namespace mlp_ext::cpu {

namespace {

// Memory of a packed operand.
at::Tensor panels(int64_t lines, int64_t depth) {
  return empty_cached({tile_panels_bytes(lines, depth) / item_size(DType::bfloat16)}, at::kBFloat16);
}

Range piece_of_panels(int64_t i, int64_t n, int64_t size) { return piece_of_lines(i, n, size, kPanelSide); }

// Runs f(rows, columns) for piece i of a grid over [rows, columns].
template <class F>
void run_piece(const Grid& grid, int64_t i, int64_t rows, int64_t columns, const F& f) {
  const Range r = piece_of_panels(i / grid.columns, grid.rows, rows);
  const Range c = piece_of_panels(i % grid.columns, grid.columns, columns);
  if (r.size() > 0 && c.size() > 0) f(r, c);
}

// Bytes of dz and x packed at a time: they stay in a cache, but for dW so large that its sums are read and written
// with each part.
int64_t packed_bytes(int64_t weights) { return std::clamp<int64_t>(64 * weights, 2 << 20, 32 << 20); }

int64_t packing_pieces(int64_t elements) {
  return std::clamp<int64_t>(elements / limits_of(DType::bfloat16).elements_per_thread, 1, threads());
}

// The rows `samples` of a problem.
Backward part_of(const Backward& b, Range samples) {
  const auto from = [&](auto m) {
    using Byte = std::conditional_t<std::is_same_v<decltype(m), Matrix>, char, const char>;
    if (m.data) m.data = static_cast<Byte*>(m.data) + samples.begin * m.stride * item_size(DType::bfloat16);
    return m;
  };
  Backward part = b;
  part.M = samples.size();
  part.dy = from(b.dy), part.saved = from(b.saved), part.x = from(b.x), part.dx = from(b.dx);
  return part;
}

// With few rows, each thread packs its own columns of B while it multiplies, and none is written to memory.
bool packs_once(int64_t M) { return M <= kTileRowsInL2; }
Grid columns_of(const Grid& grid) { return {1, grid.size(), 1}; }

}  // namespace

// y = act(x W^T + b)
void forward_by_amx(const Forward& f, Grid grid, const TileKernels& kernels) {
  const bool once = packs_once(f.M);
  if (once) grid = columns_of(grid);
  const at::Tensor w = once ? at::Tensor() : panels(f.N, f.K);
  void* const w_panels = once ? nullptr : w.mutable_data_ptr();
  const int64_t packing = once ? 0 : packing_pieces(f.N * f.K);
  in_region_if(packing > 1 || grid.size() > 1, [&] {
    for_pieces(packing,
               [&](int64_t i) { kernels.pack_b_transposed(f.w, piece_of_panels(i, packing, f.N), f.K, w_panels); });
    for_pieces(grid.size(), [&](int64_t i) {
      run_piece(grid, i, f.M, f.N, [&](Range rows, Range columns) {
        kernels.forward(f, w_panels, rows, columns, scratch(kScratchBytes));
      });
    });
  });
}

namespace {

// Parts of the memory of backward, as offsets in bytes.
struct BackwardMemory {
  explicit BackwardMemory(const Backward& b) {
    const bool needs_dx = b.dx.data, needs_dw = b.dw || b.update_w, needs_db = b.db || b.update_b;
    const int64_t row_bytes = 2 * ((needs_dx ? b.N : 0) + (needs_dw ? b.N + b.K : 0));
    const int64_t rows_at_once = packed_bytes(b.N * b.K) / std::max<int64_t>(1, row_bytes) / kPanelSide * kPanelSide;
    rows = std::clamp<int64_t>(rows_at_once, kPanelSide, ceil_div(b.M, kPanelSide) * kPanelSide);
    if (needs_dx && !packs_once(b.M)) w = take(tile_panels_bytes(b.K, b.N));
    if (needs_dx) dz = take(tile_panels_bytes(rows, b.N));
    if (needs_dw) dz_transposed = take(tile_panels_bytes(b.N, rows));
    if (needs_dw) x = take(tile_panels_bytes(b.K, rows));
    if (needs_dw && rows < b.M) partial = take(b.N * b.K * sizeof(float));
    if (needs_db) db = take(b.N * sizeof(float));
    if (needs_db) totals = take(b.N * sizeof(double));
  }

  int64_t rows;  // of dz and x packed at a time
  int64_t w = -1, dz = -1, dz_transposed = -1, x = -1, partial = -1, db = -1, totals = -1;
  int64_t bytes = 0;

 private:
  int64_t take(int64_t size) { return std::exchange(bytes, bytes + ceil_div(size, kCacheLine) * kCacheLine); }
};

}  // namespace

int64_t backward_bytes_by_amx(const Backward& b) { return BackwardMemory(b).bytes; }

// dz = act'(dy, saved);  dx = dz W;  dW = dz^T x;  db = sum over rows of dz
void backward_by_amx(const Backward& problem, const Plan& plan, const TileKernels& kernels, void* memory) {
  const int64_t M = problem.M, K = problem.K, N = problem.N;
  const bool needs_dx = problem.dx.data, needs_dw = problem.dw || problem.update_w, once = packs_once(M);
  const Grid dx_grid = once ? columns_of(plan.grad_input) : plan.grad_input;
  // By rows of W, as forward packs them: each thread then updates what it reads.
  const Grid dw_grid =
      N >= kPanelSide * plan.grad_weight.size() ? Grid{plan.grad_weight.size(), 1, 1} : plan.grad_weight;
  const BackwardMemory parts(problem);
  const int64_t each = parts.rows;
  const auto at = [&](int64_t offset) -> void* { return offset < 0 ? nullptr : static_cast<char*>(memory) + offset; };
  void *const w = at(parts.w), *const dz = at(parts.dz), *const dz_t = at(parts.dz_transposed), *const x = at(parts.x);
  float *const partial = static_cast<float*>(at(parts.partial)), *const db = static_cast<float*>(at(parts.db));
  double* const totals = static_cast<double*>(at(parts.totals));
  std::fill_n(totals, totals ? N : 0, 0.0);

  const int64_t packing = packing_pieces(std::min(each, M) * (N + K) + N * K);
  in_region_if(packing > 1 || dx_grid.size() > 1 || dw_grid.size() > 1, [&] {
    for (int64_t begin = 0; begin < M; begin += each) {
      const Backward b = part_of(problem, {begin, std::min(M, begin + each)});
      const bool first = begin == 0, last = begin + each >= M;
      for_pieces(packing, [&](int64_t i) {
        kernels.pack_grad(b, piece_of_panels(i, packing, N), dz, dz_t, totals);
        const Range columns = piece_of_panels(i, packing, K);
        if (needs_dw) kernels.pack_b(b.x, columns, b.M, x);
        if (w && first) kernels.pack_b(b.w, columns, N, w);
      });
      const auto multiply_dx = [&](Range rows, Range columns) {
        kernels.grad_input(b, dz, w, rows, columns, scratch(kScratchBytes));
      };
      const auto multiply_dw = [&](Range rows, Range columns) {
        kernels.grad_weight(b, dz_t, x, rows, columns, partial, first, last, scratch(kScratchBytes));
      };
      const int64_t dx_pieces = needs_dx ? dx_grid.size() : 0, dw_pieces = needs_dw ? dw_grid.size() : 0;
      const auto run = [&](bool of_dx, int64_t p) {
        if (of_dx && p < dx_pieces) run_piece(dx_grid, p, b.M, K, multiply_dx);
        if (!of_dx && p < dw_pieces) run_piece(dw_grid, p, N, K, multiply_dw);
      };
      if (dx_pieces && dw_pieces && !(once && b.update_w)) {
        for_pieces(2 * std::max(dx_pieces, dw_pieces),  // a thread's own pieces are neighbours
                   [&](int64_t i) { run(i % 2 == 0, i / 2); });
      } else {  // dx reads W, which dW updates
        for_pieces(dx_pieces, [&](int64_t p) { run(true, p); });
        for_pieces(dw_pieces, [&](int64_t p) { run(false, p); });
      }
    }
  });
  if (!db) return;
  kernels.round_db(totals, N, db);
  if (problem.update_b)
    variant().step_kernels(DType::bfloat16).update(*problem.update_b, db, 1, N, {0, N});
  else
    variant().layer_kernels(DType::bfloat16).combine(db, 1, N, {0, N}, problem.db);
}

}  // namespace mlp_ext::cpu
