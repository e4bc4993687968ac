// Picks a path for each shape and splits it over threads. Pure functions: no tensors, no CPU detection, easy to test.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

namespace mlp_ext::cpu {

enum class Path {
  small,       // one thread, nothing packed
  dots,        // forward: lanes along K, nothing packed
  tall,        // backward: dx, dW and db in one pass over blocks of rows
  one_input,   // backward: as tall, row by row, for K = 1
  one_output,  // backward: as tall, row by row, for N = 1
  packed,      // blocked and packed, one GEMM after another
  library,     // torch's GEMMs, with one elementwise pass after (y) or before (dz, db)
};
constexpr const char* path_name(Path path) {
  constexpr const char* names[] = {"small", "dots", "tall", "one_input", "one_output", "packed", "library"};
  return names[static_cast<int>(path)];
}

// How this processor multiplies a dtype.
enum class DotMode {
  fma,       // 16-bit types are converted to float
  bf16_dot,  // AVX512_BF16 pairs, in our kernels and in torch's library
  amx,       // matrix unit, used by torch's library only
};
constexpr const char* kDotModes[] = {"fma", "bf16_dot", "amx"};

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

// Thresholds. Shapes are MxKxN, measured on a two-core Zen 4 (AVX-512).

// small and dots
constexpr int64_t kSmallMultiplyAdds = 1 << 12;      // M K N; above, packing pays off
constexpr int64_t kMultiplyAddsPerThread = 1 << 17;  // below, waking a thread costs more than it saves
constexpr int64_t kSmallDotDepth = 8;                // K / M; above, small layers use dots: no transposed copy of W
constexpr int64_t kDotRows = 16;                     // M; up to here transposing W costs as much as the GEMM
constexpr int64_t kDotRowsIfDeep = 64;               // M if K >= kDotDepth M (24x784x256 dots, 32x300x256 packed)
constexpr int64_t kDotDepth = 12;                    // K / M
constexpr int64_t kBf16DotRowsIfDeep = 32;           // the same for bf16_dot; converted bfloat16 is packed instead
constexpr int64_t kDotColumns = 4;                   // N; up to here tiles are mostly empty
constexpr int64_t kTinyDepth = 24;                   // K; up to here tiles still beat dots (65536x16x4, not 65536x32x4)

// tall, one_input, one_output
constexpr int64_t kTallRowBytes = 2048;    // N; a row of dz fits one depth block
constexpr int64_t kTallInputs = 1024;      // K; a block of x stays in L2
constexpr int64_t kTallWeights = 1 << 18;  // N K; bounds the dW of each thread; more gains little (8192x512x512)
constexpr int64_t kOneBreadth = 1 << 16;   // N if K = 1, K if N = 1; bounds the workspace
constexpr int64_t kSkinnyM = 4;            // M; up to here dW is bound by stores, not by arithmetic

// library (torch's GEMM), from these sizes on
constexpr int64_t kLibraryMultiplyAdds = 1 << 24;  // M K N; 16384x64x64 library, 2048x64x64 no gain over tall
constexpr int64_t kLibraryInputs = 24;             // K; below, tall wins (65536x16x32)
constexpr int64_t kLibraryOutputs = 16;            // N; below, tall wins (65536x256x8)
constexpr int64_t kLibraryWeights = 1 << 20;       // N K; alternative to M K N for few rows (4x1024x1024)
constexpr int64_t kLibraryDepth = 1024;            // K; forward gains only from here (128x1024x1024, not 256x512x512)

// packed
constexpr int64_t kRowsPerPiece = 512;        // M; bounds the float accumulators of 16-bit results
constexpr int64_t kBiasesPerPiece = 1 << 18;  // N; bounds the sums of db
constexpr int64_t kDepthBytes = 2048;         // depth block of A; half of it writes partial sums twice as often
constexpr int64_t kBlockColumns = 1024;       // column block of C; A is packed once per block
constexpr int64_t kPieceEdge = 64;            // narrowest piece, a few tiles

// Training steps: StepPath::blocks
constexpr int64_t kStepRowBytes = kDepthBytes;  // widest layer; tiles then cover the whole depth
constexpr int64_t kStepWidthBf16Dot = 48;       // widest layer where bfloat16 dots exist: blocks use float FMA only
constexpr size_t kMostLayers = 32;
constexpr int64_t kStepWeights = 1 << 18;  // each thread packs them twice and has its own gradients
constexpr int64_t kStepRows = 32;          // M per thread; below, reducing the gradients costs more than it saves

// Training steps: StepPath::panels
constexpr int64_t kFewestPanelRows = 32;          // M, one panel; panels beat layers there (784-256-10)
constexpr int64_t kMostPanelBytes = kDepthBytes;  // M; dW takes one depth block; no gain from 1024 rows on
constexpr int64_t kPanelRowsPerEmptyLane = 16;    // M / empty lanes of the last vector
constexpr int64_t kMostPanelOutputs = 1 << 13;    // outputs; the loss of a panel fits the workspace
constexpr int64_t kPanelColumns = 32;             // columns of W per thread

// Losses and copies
constexpr int64_t kLossRows = 8;                 // rows of outputs per call of the loss kernel
constexpr int64_t kElementsPerThread = 1 << 12;  // copied, or outputs with a loss

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
  const auto at_most = [](int64_t size) { return std::max<int64_t>(1, size / kPieceEdge); };
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

// N is so small that lanes along K (dots) beat tiles with lanes along N.
constexpr bool tiles_mostly_empty(int64_t K, int64_t N) { return N == 1 || (N <= kDotColumns && K > kTinyDepth); }

struct PlanOptions {
  bool library = true;  // may use torch's GEMM
  bool both = true;     // backward computes dx and dW
  bool update = false;  // backward updates W once dx is computed
};

// item_size: bytes per element.
inline Plan make_plan(int64_t M, int64_t K, int64_t N, int64_t item_size, int64_t threads, DotMode mode = DotMode::fma,
                      PlanOptions options = {}) {
  const int64_t multiply_adds = M * K * N, bias_pieces = std::max<int64_t>(1, ceil_div(N, kBiasesPerPiece));
  if (multiply_adds <= kSmallMultiplyAdds) {
    const bool transposing_costs_more = N == 1 || kSmallDotDepth * M <= K;
    return {transposing_costs_more ? Path::dots : Path::small, Path::small, {}, {}, {bias_pieces}, false};
  }
  const int64_t pieces = std::clamp<int64_t>(multiply_adds / kMultiplyAddsPerThread, 1, threads);
  const bool at_once = options.both && !options.update && threads > 1 && multiply_adds >= kMultiplyAddsPerThread;
  const int64_t each = at_once && pieces % 2 == 0 ? pieces / 2 : pieces;  // odd: every thread takes a part of both
  Plan plan{Path::packed,
            Path::packed,
            cut(M, N, pieces, kForwardPacking),
            cut(M, K, each, kBackwardPacking),
            cut(N, K, each, kBackwardPacking),
            at_once};
  plan.grad_weight.rows = std::max(plan.grad_weight.rows, bias_pieces);

  const int64_t rows_if_deep = item_size > 2 ? kDotRowsIfDeep : mode == DotMode::fma ? 0 : kBf16DotRowsIfDeep;
  const bool transposing_costs_more = M <= kDotRows || (M <= rows_if_deep && K >= kDotDepth * M);
  if (transposing_costs_more || tiles_mostly_empty(K, N)) plan.forward_path = Path::dots;

  const int64_t row_bytes = N * std::max<int64_t>(item_size, 4);  // of dz, in accumulators
  const bool blocks_stay_in_cache = row_bytes <= kTallRowBytes && K <= kTallInputs && N * K <= kTallWeights;
  const bool rows_outweigh_sums = M >= 2 * pieces * std::max(N, K);
  if (N == 1 && K <= kOneBreadth)
    plan.backward_path = Path::one_output;
  else if (K == 1 && N <= kOneBreadth)
    plan.backward_path = Path::one_input;
  else if (blocks_stay_in_cache && rows_outweigh_sums)
    plan.backward_path = Path::tall;
  if (plan.backward_path != Path::packed) plan.grad_input = plan.grad_weight = {1, 1, pieces};
  // torch's AMX GEMM reads past the end of rows of odd width.
  const bool rows_in_whole_pairs = mode != DotMode::amx || (K % 2 == 0 && N % 2 == 0);
  const bool fills_library = options.library && mode != DotMode::fma && rows_in_whole_pairs && M > 1 &&
                             K >= kLibraryInputs && N >= kLibraryOutputs &&
                             (multiply_adds >= kLibraryMultiplyAdds || N * K >= kLibraryWeights);
  const bool update_in_product = options.update && mode == DotMode::bf16_dot && plan.backward_path == Path::packed;
  if (fills_library && !update_in_product) plan.backward_path = Path::library;
  const bool forward_too = mode == DotMode::amx || K >= kLibraryDepth;
  if (forward_too && fills_library && plan.forward_path == Path::packed) plan.forward_path = Path::library;
  if (item_size == 2) {  // partial sums of 16-bit results are kept in the workspace
    plan.forward.rows = std::max(plan.forward.rows, ceil_div(M, kRowsPerPiece));
    plan.grad_input.rows = std::max(plan.grad_input.rows, ceil_div(M, kRowsPerPiece));
  }
  return plan;
}

enum class StepPath {
  blocks,  // all layers on one block of rows at a time
  panels,  // layer by layer on transposed, packed activations
  layers,  // layer by layer with the kernels of linear_act
};
constexpr const char* step_path_name(StepPath path) {
  constexpr const char* names[] = {"blocks", "panels", "layers"};
  return names[static_cast<int>(path)];
}

struct StepPlan {
  StepPath path;
  int64_t pieces;  // of the rows, for StepPath::blocks
};

// widths: of the input and of each layer. item_size: bytes per element.
inline StepPlan make_step_plan(int64_t M, std::span<const int64_t> widths, int64_t item_size, int64_t threads,
                               DotMode mode = DotMode::fma) {
  int64_t multiply_adds = 0;  // per row, which is also the number of weights
  bool columns_suffice = true;
  for (size_t l = 1; l < widths.size(); ++l) {
    const int64_t K = widths[l - 1], N = widths[l];
    multiply_adds += K * N;
    if (M * K * N > threads * kMultiplyAddsPerThread && K < threads * kPanelColumns) columns_suffice = false;
  }
  const int64_t pieces = std::clamp<int64_t>(M * multiply_adds / kMultiplyAddsPerThread, 1, threads);
  const int64_t widest = *std::max_element(widths.begin(), widths.end());
  const bool rows_fit = widest * std::max<int64_t>(4, item_size) <= kStepRowBytes && widths.size() <= kMostLayers + 1;
  const bool weights_stay_in_cache = multiply_adds <= kStepWeights;
  const bool rows_outweigh_sums = pieces == 1 || M >= pieces * kStepRows;
  const bool single_suffices = mode == DotMode::fma || widest <= kStepWidthBf16Dot;
  if (rows_fit && weights_stay_in_cache && rows_outweigh_sums && single_suffices) return {StepPath::blocks, pieces};

  const int64_t lanes = 64 / item_size, empty = ceil_div(M, lanes) * lanes - M;
  const bool batch_fits =
      kFewestPanelRows <= M && M * item_size <= kMostPanelBytes && kPanelRowsPerEmptyLane * empty <= M;
  const bool loss_fits = widths.back() <= kMostPanelOutputs;
  const bool some_layer = *std::min_element(widths.begin(), widths.end()) > 0;
  if (item_size >= 4 && batch_fits && loss_fits && columns_suffice && some_layer && pieces == threads)
    return {StepPath::panels, pieces};
  return {StepPath::layers, pieces};
}

}  // namespace mlp_ext::cpu
