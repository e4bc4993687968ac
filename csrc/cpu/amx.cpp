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

// Piece i of n of [0, size), split at panels.
Range piece_of_panels(int64_t i, int64_t n, int64_t size) {
  const int64_t count = ceil_div(size, kPanelSide);
  return {std::min(size, i * count / n * kPanelSide), std::min(size, (i + 1) * count / n * kPanelSide)};
}

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
bool packs_once(int64_t M) { return M <= kTileRowsInL2 / 2; }
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

// dz = act'(dy, saved);  dx = dz W;  dW = dz^T x;  db = sum over rows of dz
void backward_by_amx(const Backward& problem, const Plan& plan, const TileKernels& kernels) {
  const int64_t M = problem.M, K = problem.K, N = problem.N;
  const bool needs_dx = problem.dx.data, needs_dw = problem.dw || problem.update_w,
             needs_db = problem.db || problem.update_b;
  const int64_t row_bytes = 2 * ((needs_dx ? N : 0) + (needs_dw ? N + K : 0));
  const int64_t each =
      std::clamp<int64_t>(packed_bytes(N * K) / std::max<int64_t>(1, row_bytes) / kPanelSide * kPanelSide, kPanelSide,
                          ceil_div(M, kPanelSide) * kPanelSide);
  // W is updated beside dx, so it is packed before.
  const bool once = packs_once(M) && !problem.update_w;
  const Grid dx_grid = once ? columns_of(plan.grad_input) : plan.grad_input;
  const at::Tensor w = needs_dx && !once ? panels(K, N) : at::Tensor(), dz = needs_dx ? panels(each, N) : at::Tensor(),
                   dz_t = needs_dw ? panels(N, each) : at::Tensor(), x = needs_dw ? panels(K, each) : at::Tensor();
  const at::Tensor partial = needs_dw && each < M ? empty_cached({N, K}, at::kFloat) : at::Tensor();
  const at::Tensor db = needs_db ? empty_cached({N}, at::kFloat) : at::Tensor();
  const at::Tensor db_totals = needs_db ? empty_cached({N}, at::kDouble) : at::Tensor();
  const auto data = [](const at::Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; };
  double* const totals = static_cast<double*>(data(db_totals));
  std::fill_n(totals, needs_db ? N : 0, 0.0);

  const int64_t packing = packing_pieces(std::min(each, M) * (N + K) + N * K);
  in_region_if(packing > 1 || plan.grad_input.size() > 1 || plan.grad_weight.size() > 1, [&] {
    for (int64_t begin = 0; begin < M; begin += each) {
      const Backward b = part_of(problem, {begin, std::min(M, begin + each)});
      const bool first = begin == 0, last = begin + each >= M;
      for_pieces(packing, [&](int64_t i) {
        kernels.pack_grad(b, piece_of_panels(i, packing, N), data(dz), data(dz_t), totals);
        const Range columns = piece_of_panels(packing - 1 - i, packing, K);
        if (needs_dw) kernels.pack_b(b.x, columns, b.M, data(x));
        if (w.defined() && first) kernels.pack_b(b.w, columns, N, data(w));
      });
      const int64_t dx_pieces = needs_dx ? dx_grid.size() : 0, dw_pieces = needs_dw ? plan.grad_weight.size() : 0;
      for_pieces(dx_pieces + dw_pieces, [&](int64_t i) {
        if (i < dx_pieces)
          run_piece(dx_grid, i, b.M, K,
                    [&](Range rows, Range columns) {
                      kernels.grad_input(b, data(dz), data(w), rows, columns, scratch(kScratchBytes));
                    });
        else
          run_piece(plan.grad_weight, i - dx_pieces, N, K, [&](Range rows, Range columns) {
            kernels.grad_weight(b, data(dz_t), data(x), rows, columns, static_cast<float*>(data(partial)), first, last,
                                scratch(kScratchBytes));
          });
      });
    }
  });
  if (!needs_db) return;
  float* const sums = static_cast<float*>(data(db));
  kernels.round_db(totals, N, sums);
  if (problem.update_b)
    variant().step_kernels(DType::bfloat16).update(*problem.update_b, sums, 1, N, {0, N});
  else
    variant().layer_kernels(DType::bfloat16).combine(sums, 1, N, {0, N}, problem.db);
}

}  // namespace mlp_ext::cpu
