// Picks a path for each shape and splits it over threads. Pure functions: no tensors, no CPU detection, easy to test.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>

#include "cpu/machine.h"

namespace mlp_ext::cpu {

enum class Path {
  small,       // one thread, nothing packed
  dots,        // forward: lanes along K, nothing packed
  narrow,      // few inputs and outputs: several rows in a vector
  tall,        // backward: dx, dW and db in one pass over blocks of rows
  one_input,   // K = 1: forward as narrow, backward as tall, row by row
  one_output,  // backward: as tall, row by row, for N = 1
  few_rows,    // backward: W row by row, bound by memory
  packed,      // blocked and packed, one GEMM after another
  amx,         // packed once for the tile unit
  library,     // torch's GEMMs, with one elementwise pass after (y) or before (dz, db)
};
constexpr const char* kPathNames[] = {"small",      "dots",     "narrow", "tall", "one_input",
                                      "one_output", "few_rows", "packed", "amx",  "library"};
constexpr const char* path_name(Path path) { return kPathNames[static_cast<int>(path)]; }

// Number of pieces along the rows, columns and reduction of a GEMM; each piece is one thread's work.
struct Grid {
  int64_t rows = 1, columns = 1, samples = 1;
  int64_t size() const { return rows * columns * samples; }
};

struct Plan {
  Path forward_path, backward_path;
  Grid forward, grad_input, grad_weight;
  bool concurrent_gemms;  // dx and dW at once on half of the threads each, so that fewer pieces pack the same data
};

// Bounds that no machine changes; those of the workspace are in machine.h.
constexpr int64_t kSmallestPieceEdge = 64;           // narrowest piece, a few tiles
constexpr int64_t kBlockColumns = 1024;              // column block of C; A is packed once per block
constexpr int64_t kRowsPerPiece = 512;               // M; bounds the float accumulators of 16-bit results
constexpr int64_t kBiasesPerPiece = 1 << 18;         // N; bounds the sums of db
constexpr int64_t kMostPanelOutputs = 1 << 13;       // outputs; the loss of a panel fits the workspace
constexpr size_t kMostLayers = 32;                   // of StepPath::lanes, blocks and ManyPath::lanes
constexpr int64_t kFewOutputs = 32;                  // M N; below, packing W costs more than narrow saves
constexpr int64_t kMostSmallMultiplyAdds = 1 << 16;  // bounds the workspace of small
constexpr int64_t kTileDepth = 1 << 14;              // K of amx; bounds the packed rows of x
constexpr int64_t kLossRows = 8;                     // rows of outputs per call of the loss kernel
constexpr int64_t kRowsPerSum = 1 << 15;             // M of a piece of tall or blocks, whose sums add block after block
constexpr int64_t kFlushedMultiplyAdds = 1 << 12;  // above, torch's bfloat16 GEMM flushes subnormals, as VDPBF16PS does

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Relative cost of packing an element of A and of B. Each piece packs its own operands.
struct PackingCost {
  int64_t a, b;
};
constexpr PackingCost kForwardPacking{1, 2};   // W is transposed
constexpr PackingCost kPanelPacking{1, 0};     // A is a plain copy of W; B is already packed
constexpr PackingCost kBackwardPacking{2, 1};  // A is dz, computed from dy and y

// Splits [rows, columns] into up to `pieces` pieces with the least packing.
inline Grid cut(int64_t rows, int64_t columns, int64_t pieces, PackingCost packing) {
  const auto at_most = [](int64_t size) { return std::max<int64_t>(1, size / kSmallestPieceEdge); };
  Grid best;
  int64_t best_pieces = 0, best_cost = 0;
  for (int64_t r = 1; r <= pieces; ++r) {
    const Grid grid{std::min(r, at_most(rows)), std::min(pieces / r, at_most(columns))};
    const int64_t times_a = grid.columns * ceil_div(columns, grid.columns * kBlockColumns);
    const int64_t cost = times_a * rows * packing.a + grid.rows * columns * packing.b;
    if (grid.size() > best_pieces || (grid.size() == best_pieces && cost < best_cost)) {
      best = grid;
      best_pieces = grid.size();
      best_cost = cost;
    }
  }
  return best;
}

// A multiple of the pieces, so that each has at most kRowsPerSum rows.
constexpr int64_t pieces_of_rows(int64_t M, int64_t pieces) {
  return pieces * std::max<int64_t>(1, ceil_div(M, pieces * kRowsPerSum));
}

// A layer as the plan sees it. item_size: bytes per element.
struct LayerShape {
  int64_t M, K, N, item_size;
  DotMode mode;

  int64_t multiply_adds() const { return M * K * N; }
  int64_t unpacked() const { return M * std::max<int64_t>(K, 1) * N; }  // small: with the outputs of an empty sum
  int64_t row_bytes(int64_t columns) const { return columns * std::max<int64_t>(item_size, 4); }  // as accumulated
};

// Whether the kernels of a path can compute a shape, at whatever speed.
inline bool supports(Path path, const LayerShape& s, bool forward) {
  // torch's AMX GEMM reads past the end of rows of odd width.
  const bool rows_in_whole_pairs = s.mode != DotMode::amx || (s.K % 2 == 0 && s.N % 2 == 0);
  switch (path) {
    case Path::small:
      return s.unpacked() <= kMostSmallMultiplyAdds;
    case Path::dots:
      return forward;
    case Path::narrow:
      return s.row_bytes(s.K) <= kNarrowBytes && s.row_bytes(s.N) <= kNarrowBytes && s.K * s.N > 0;
    case Path::tall:
      return !forward && s.row_bytes(s.N) <= kTallRowBytes && s.K <= kTallInputs && s.N * s.K <= kTallWeights;
    case Path::one_input:
      return s.K == 1 && s.N > 0 && s.N <= kOneBreadth;
    case Path::one_output:
      return !forward && s.N == 1 && s.K <= kOneBreadth;
    case Path::few_rows:
      return !forward && s.M <= kMostFewRows && s.K > 0;
    case Path::packed:
      return true;
    case Path::amx:
      return s.mode == DotMode::amx && s.item_size == 2 && s.multiply_adds() > 0 && (!forward || s.K <= kTileDepth);
    case Path::library:  // torch multiplies float16 slowly
      return (s.item_size > 2 || s.mode != DotMode::fma) && rows_in_whole_pairs && s.multiply_adds() > 0;
  }
  return false;
}

struct PlanOptions {
  bool library = true;                              // may use torch's GEMM
  bool both = true;                                 // backward computes dx and dW
  bool update = false;                              // backward updates W once dx is computed
  std::optional<Path> forward = {}, backward = {};  // forced, where supported
};

inline Plan make_plan(const LayerShape& shape, int64_t threads, const Machine& machine, PlanOptions options = {}) {
  const auto [M, K, N, item_size, mode] = shape;
  const Limits& limits = machine.limits(item_size, mode);
  const int64_t multiply_adds = shape.multiply_adds(), bias_pieces = std::max<int64_t>(1, ceil_div(N, kBiasesPerPiece));
  const int64_t pieces = std::clamp<int64_t>(multiply_adds / limits.multiply_adds_per_thread, 1, threads);
  const bool at_once =
      options.both && !options.update && threads > 1 && multiply_adds >= limits.multiply_adds_per_thread;
  const int64_t each = at_once && pieces % 2 == 0 ? pieces / 2 : pieces;  // odd: every thread takes a part of both
  Plan plan{Path::packed,
            Path::packed,
            cut(M, N, pieces, kForwardPacking),
            cut(M, K, each, kBackwardPacking),
            cut(N, K, each, kBackwardPacking),
            at_once};
  plan.grad_weight.rows = std::max(plan.grad_weight.rows, bias_pieces);

  const bool is_small = shape.unpacked() <= limits.small_multiply_adds;
  const bool fills_library = options.library && M >= 2 && K >= limits.library_inputs && N >= limits.library_outputs &&
                             (multiply_adds >= limits.library_multiply_adds || N * K >= limits.library_weights) &&
                             supports(Path::library, shape, true);

  const bool is_deep = M <= limits.dot_rows_if_deep && K >= limits.dot_depth * M;
  const bool few_outputs = M * N < kFewOutputs, one_input = supports(Path::one_input, shape, true) && !few_outputs;
  const bool narrow = supports(Path::narrow, shape, true) && !few_outputs &&
                      (N == 1 ? 2 : 1) * shape.row_bytes(K) <= limits.narrow_bytes &&
                      shape.row_bytes(N) <= limits.narrow_bytes;
  const bool fills_tiles = M >= limits.amx_rows;
  if (one_input)
    plan.forward_path = Path::one_input;
  else if (narrow)
    plan.forward_path = Path::narrow;
  else if (!is_small && fills_tiles && K >= limits.amx_inputs && N >= limits.amx_outputs &&
           supports(Path::amx, shape, true))
    plan.forward_path = Path::amx;
  else if (is_small)
    plan.forward_path = N == 1 || limits.small_dot_depth * M <= K ? Path::dots : Path::small;
  else if (M <= limits.dot_rows || is_deep ||
           limits.tiles_mostly_empty(K, N))  // transposing W costs more than it saves
    plan.forward_path = Path::dots;
  else if (fills_library && K >= limits.library_forward_inputs)
    plan.forward_path = Path::library;

  const bool blocks_stay_in_cache =
      supports(Path::tall, shape, false) && K <= limits.tall_inputs && N * K <= limits.tall_weights;
  const bool rows_outweigh_sums = M >= 2 * pieces * std::max(N, K);
  const bool narrow_wins = M >= limits.narrow_rows && 2 * shape.row_bytes(K) <= limits.narrow_bytes &&
                           (K == 1 ? 2 : 1) * shape.row_bytes(N) <= limits.narrow_bytes && K * N > 1;
  if (narrow && narrow_wins)
    plan.backward_path = Path::narrow;
  else if (is_small && !one_input)
    plan.backward_path = Path::small;
  else if (fills_tiles && std::min(K, N) >= limits.amx_backward_columns && supports(Path::amx, shape, false))
    plan.backward_path = Path::amx;
  else if (supports(Path::one_output, shape, false))
    plan.backward_path = Path::one_output;
  else if (supports(Path::one_input, shape, false))
    plan.backward_path = Path::one_input;
  else if (M <= limits.few_rows && supports(Path::few_rows, shape, false))
    plan.backward_path = Path::few_rows;
  else if (blocks_stay_in_cache && rows_outweigh_sums)
    plan.backward_path = Path::tall;
  // With bf16_dot, few_rows beats the library, and so does packed if it updates W in its epilogue.
  const Path own = plan.backward_path;
  const bool own_wins = own == Path::amx || (mode == DotMode::bf16_dot &&
                                             (own == Path::few_rows || (own == Path::packed && options.update)));
  if (fills_library && !is_small && !own_wins) plan.backward_path = Path::library;

  if (options.forward && supports(*options.forward, shape, true)) plan.forward_path = *options.forward;
  if (options.backward && supports(*options.backward, shape, false)) plan.backward_path = *options.backward;
  const Path forward = plan.forward_path, backward = plan.backward_path;
  if ((forward == Path::narrow || forward == Path::one_input) && M >= kSmallestPieceEdge * pieces)
    plan.forward = {pieces, 1, 1};
  if (backward == Path::few_rows) {
    const auto at_most = [&](int64_t size) { return std::clamp<int64_t>(size / kSmallestPieceEdge, 1, pieces); };
    const bool by_rows = at_most(N) == pieces;  // of W, over which dx is summed
    plan.grad_input = by_rows ? Grid{1, 1, pieces} : Grid{1, at_most(K), 1};
    plan.grad_weight = by_rows ? Grid{pieces, 1, 1} : plan.grad_input;
  }
  if (backward == Path::one_input || backward == Path::one_output) plan.grad_input = plan.grad_weight = {1, 1, pieces};
  if (backward == Path::tall || backward == Path::narrow)  // without shuffles, narrow is tall
    plan.grad_input = plan.grad_weight = {1, 1, pieces_of_rows(M, pieces)};
  // Partial sums of 16-bit results are kept in the workspace.
  const int64_t fewest_rows = item_size == 2 ? ceil_div(M, kRowsPerPiece) : 1;
  if (plan.forward_path == Path::packed) plan.forward.rows = std::max(plan.forward.rows, fewest_rows);
  if (plan.backward_path == Path::packed) plan.grad_input.rows = std::max(plan.grad_input.rows, fewest_rows);
  return plan;
}

enum class StepPath {
  lanes,   // as blocks, with a row in each lane of a vector
  blocks,  // all layers on one block of rows at a time
  panels,  // layer by layer on transposed, packed activations
  layers,  // layer by layer with the kernels of linear_act
};
constexpr const char* step_path_name(StepPath path) {
  constexpr const char* names[] = {"lanes", "blocks", "panels", "layers"};
  return names[static_cast<int>(path)];
}

struct StepPlan {
  StepPath path;
  int64_t pieces;  // of the rows, for StepPath::lanes and blocks
};

// widths: of the input and of each layer. item_size: bytes per element.
inline StepPlan make_step_plan(int64_t M, std::span<const int64_t> widths, int64_t item_size, int64_t threads,
                               DotMode mode, const Machine& machine) {
  const Limits& limits = machine.limits(item_size, mode);
  int64_t multiply_adds = 0;  // per row, which is also the number of weights
  bool columns_suffice = true;
  for (size_t l = 1; l < widths.size(); ++l) {
    const int64_t K = widths[l - 1], N = widths[l];
    multiply_adds += K * N;
    if (M * K * N > threads * limits.multiply_adds_per_thread && K < threads * limits.panel_columns)
      columns_suffice = false;
  }
  const int64_t pieces = std::clamp<int64_t>(M * multiply_adds / limits.multiply_adds_per_thread, 1, threads);
  const int64_t widest = *std::max_element(widths.begin(), widths.end());
  const bool rows_fit = widest * std::max<int64_t>(4, item_size) <= kStepRowBytes && widest <= limits.step_width &&
                        widths.size() <= kMostLayers + 1;
  const bool weights_stay_in_cache = multiply_adds <= limits.step_weights;
  const bool rows_outweigh_sums = pieces == 1 || M >= pieces * limits.step_rows;
  const int64_t lanes = 64 / item_size, empty = ceil_div(M, lanes) * lanes - M;
  const bool some_layer = *std::min_element(widths.begin(), widths.end()) > 0;
  const bool rows_fill_lanes = item_size >= 4 && multiply_adds <= limits.row_lane_weights &&
                               M * item_size >= pieces * limits.row_lane_bytes && some_layer;
  if (rows_fit && weights_stay_in_cache && rows_outweigh_sums) {
    if (rows_fill_lanes) return {StepPath::lanes, pieces};
    return {StepPath::blocks, pieces_of_rows(M, pieces)};
  }

  const bool batch_fits =
      limits.panel_rows <= M && M * item_size <= kMostPanelBytes && limits.panel_rows_per_empty_lane * empty <= M;
  const bool loss_fits = widths.back() <= kMostPanelOutputs;
  if (item_size >= 4 && batch_fits && loss_fits && columns_suffice && some_layer && pieces == threads)
    return {StepPath::panels, pieces};
  return {StepPath::layers, pieces};
}

// Steps of many networks with the same layers.
enum class ManyPath {
  lanes,  // a network in each lane of a vector
  cores,  // a network on each thread
  turns,  // one network after another, each on all threads
};
constexpr const char* many_path_name(ManyPath path) {
  constexpr const char* names[] = {"lanes", "cores", "turns"};
  return names[static_cast<int>(path)];
}

// Depends neither on threads nor on the number of networks, so that a network's results do not either.
inline ManyPath make_many_plan(int64_t M, std::span<const int64_t> widths, int64_t item_size, DotMode mode,
                               const Machine& machine) {
  const Limits& limits = machine.limits(item_size, mode);
  int64_t weights = 0;
  for (size_t l = 1; l < widths.size(); ++l) weights += widths[l - 1] * widths[l];
  const bool some_layer = *std::min_element(widths.begin(), widths.end()) > 0;
  const bool fits = item_size >= 4 && widths.size() <= kMostLayers + 1 && weights <= limits.lane_weights;
  if (fits && some_layer) return ManyPath::lanes;
  return M * weights <= limits.core_multiply_adds ? ManyPath::cores : ManyPath::turns;
}

}  // namespace mlp_ext::cpu
