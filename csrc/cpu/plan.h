// Which path a shape takes and how it is cut for threads. Pure: no tensors, no processor, so tests can ask it anything.
#pragma once

#include <algorithm>
#include <cstdint>

namespace mlp_ext::cpu {

enum class Path { small, blocked };

// In how many pieces the rows, columns and summed samples of a product are cut; each piece is one thread's work.
struct Grid {
  int64_t rows = 1, columns = 1, samples = 1;
  int64_t size() const { return rows * columns * samples; }
};

struct Plan {
  Path path;
  Grid forward, grad_input, grad_weight;
};

// Each limit with its reason.
constexpr int64_t kSmallProducts = 1 << 12;      // above, packing pays for itself
constexpr int64_t kProductsPerThread = 1 << 17;  // below, waking a thread costs more than it takes over
constexpr int64_t kNarrow = 256 * 256;           // dW up to this size is summed privately by each thread
constexpr int64_t kSamplesPerThread = 512;       // and then reads at least so many rows
constexpr int64_t kRowsPerPiece = 512;           // bounds the accumulators of 16-bit results (kernels.h)
constexpr int64_t kPieceEdge = 64;               // a piece is not cut narrower than a few tiles

// Cuts [rows, columns] into about `pieces`, so that the operands that several pieces pack again are smallest.
inline Grid cut(int64_t rows, int64_t columns, int64_t pieces) {
  const auto at_most = [](int64_t size) { return std::max<int64_t>(1, size / kPieceEdge); };
  Grid best;
  int64_t best_pieces = 0, best_cost = 0;
  for (int64_t r = 1; r <= pieces; ++r) {
    const Grid grid{std::min(r, at_most(rows)), std::min(pieces / r, at_most(columns))};
    const int64_t cost = grid.rows * columns + grid.columns * rows;
    if (grid.size() > best_pieces || (grid.size() == best_pieces && cost < best_cost)) {
      best = grid;
      best_pieces = grid.size();
      best_cost = cost;
    }
  }
  return best;
}

inline Plan make_plan(int64_t M, int64_t K, int64_t N, int64_t threads) {
  const int64_t products = M * K * N;
  if (products <= kSmallProducts) return {Path::small, {}, {}, {}};
  const int64_t pieces = std::clamp<int64_t>(products / kProductsPerThread, 1, threads);
  Plan plan{Path::blocked, cut(M, N, pieces), cut(M, K, pieces), cut(N, K, pieces)};
  const int64_t tall = (M + kRowsPerPiece - 1) / kRowsPerPiece;
  plan.forward.rows = std::max(plan.forward.rows, tall);
  plan.grad_input.rows = std::max(plan.grad_input.rows, tall);
  const bool narrow_and_tall = N * K <= kNarrow && M >= pieces * kSamplesPerThread;
  if (narrow_and_tall) plan.grad_weight = {1, 1, pieces};
  return plan;
}

}  // namespace mlp_ext::cpu
