// Which path a shape takes and how it is cut for threads. Pure: no tensors, no processor, so tests can ask it anything.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

namespace mlp_ext::cpu {

enum class Path {
  small,       // one thread, nothing packed
  dots,        // forward: lanes along K, nothing packed
  tall,        // backward: dx, dW and db in one pass over blocks of rows
  one_input,   // backward: the same row by row, K = 1
  one_output,  // backward: the same row by row, N = 1
  packed,      // blocked and packed, each product by itself
  library,     // GEMMs of torch; one pass before or after them for y, or for dz and db
};
constexpr const char* path_name(Path path) {
  constexpr const char* names[] = {"small", "dots", "tall", "one_input", "one_output", "packed", "library"};
  return names[static_cast<int>(path)];
}

// The instructions that multiply a dtype on this processor.
enum class DotMode {
  fma,       // one number at a time; 16-bit types are converted to float
  bf16_dot,  // AVX512_BF16: two bfloat16 at a time, in our kernels and in torch's library
  amx,       // a matrix unit, which torch's library alone uses
};
constexpr const char* kDotModes[] = {"fma", "bf16_dot", "amx"};

// In how many pieces the rows, columns and summed samples of a product are cut; each piece is one thread's work.
struct Grid {
  int64_t rows = 1, columns = 1, samples = 1;
  int64_t size() const { return rows * columns * samples; }
};

struct Plan {
  Path forward_path, backward_path;
  Grid forward, grad_input, grad_weight;
  bool concurrent_gemms;  // dx and dW in one go, each on half of the threads, so that fewer pieces pack the same
};

// Each limit with its reason.
constexpr int64_t kSmallMultiplyAdds = 1 << 12;      // above, packing pays for itself
constexpr int64_t kMultiplyAddsPerThread = 1 << 17;  // below, waking a thread costs more than it takes over
constexpr int64_t kSmallDotDepth = 8;                // K / M in a small layer: 1x64x64 takes 3.6 us, transposed 4.9
constexpr int64_t kDotRows = 16;                     // few rows of x: transposing W costs as much as the product,
constexpr int64_t kDotRowsIfDeep = 64;      // up to here if the sums are long: 24x784x256 takes 48 us, packed 61,
constexpr int64_t kDotDepth = 12;           // K / M: 32x300x256 62 us, packed 57
constexpr int64_t kBf16DotRowsIfDeep = 32;  // 32x784x256 48 us, packed 51; converted, 64x784x256 190 us, packed 145
constexpr int64_t kDotColumns = 4;          // few rows of W: a tile would be mostly empty,
constexpr int64_t kTinyDepth = 24;          // K: up to here tiles beat dots even so (zen4: 65536x16x4, 65536x32x4)
constexpr int64_t kTallRowBytes = 2048;     // N: a row of dz fits one block of depth
constexpr int64_t kTallInputs = 1024;       // K: a block of x stays in L2
constexpr int64_t kTallWeights = 1 << 18;   // N K: 8192x512x512 gains 4 %, and dW of several threads takes memory
constexpr int64_t kOneBreadth = 1 << 16;    // K = 1: most N, N = 1: most K; bounds the scratch memory
constexpr int64_t kSkinnyM = 4;             // M: dW is written rather than computed
constexpr int64_t kLibraryMultiplyAdds = 1 << 24;  // 16384x64x64 backward 1.14 ms, tall 1.72; 2048x64x64 182 us, 186
constexpr int64_t kLibraryInputs = 24;             // K: 65536x16x32 1.24 ms, tall 1.06
constexpr int64_t kLibraryOutputs = 16;            // N: 65536x32x16 952 us, tall 1118; 65536x256x8 14.5 ms, 6.3
constexpr int64_t kLibraryWeights = 1 << 20;       // or N K, for few rows: 4x1024x1024 backward 167 us, packed 338
constexpr int64_t kLibraryDepth = 1024;  // K: 128x1024x1024, forward and backward, a tenth less; 256x512x512 no less
constexpr int64_t kRowsPerPiece = 512;   // bounds the accumulators of 16-bit results
constexpr int64_t kBiasesPerPiece = 1 << 18;  // N: bounds the sums of db
constexpr int64_t kDepthBytes = 2048;  // of a block of A; with 1024 a twentieth slower, sums are written twice as often
constexpr int64_t kStepRowBytes = kDepthBytes;    // of the widest rows of a step by blocks: a tile's depth is not cut
constexpr int64_t kStepWidthBf16Dot = 48;         // blocks have none: 64-64-64-64-64@4096 a sixth slower than by layers
constexpr size_t kMostLayers = 32;                // of such a step
constexpr int64_t kStepWeights = 1 << 18;         // packed twice and summed by each thread
constexpr int64_t kStepRows = 32;                 // of a thread: below, adding up the sums costs more than it saves
constexpr int64_t kFewestPanelRows = 32;          // of a step in panels: 784-256-10 takes 205 us, layers 230
constexpr int64_t kMostPanelBytes = kDepthBytes;  // of all rows of a feature: from 1024 rows on it is no faster
constexpr int64_t kPanelRowsPerEmptyLane = 16;    // in the last vector of a batch
constexpr int64_t kMostPanelOutputs = 1 << 13;    // of the network: the loss of a panel fits the scratch memory
constexpr int64_t kPanelColumns = 32;             // of W, of each thread
constexpr int64_t kLossRows = 8;                  // of outputs whose loss is taken at a time
constexpr int64_t kElementsPerThread = 1 << 12;   // copied, or outputs with a loss
constexpr int64_t kBlockColumns = 1024;           // of a product that are computed at a time: A is packed once for each
constexpr int64_t kPieceEdge = 64;                // a piece is not cut narrower than a few tiles

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What packing an element costs: A row by row, B panel by panel; each piece packs what it multiplies.
struct PackingCost {
  int64_t a, b;
};
constexpr PackingCost kForwardPacking{1, 2};   // W is transposed
constexpr PackingCost kPanelPacking{1, 0};     // A is W, a copy; B is packed
constexpr PackingCost kBackwardPacking{2, 1};  // dz is made of dy and y

// Cuts [rows, columns] into about `pieces`, so that least is packed in all.
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

// Whether lanes along N would leave a tile of [M, K] [K, N] so empty that lanes along K are faster.
constexpr bool tiles_mostly_empty(int64_t K, int64_t N) { return N == 1 || (N <= kDotColumns && K > kTinyDepth); }

struct PlanOptions {
  bool library = true;  // torch's GEMM may be used
  bool both = true;     // backward: dx and dW
  bool update = false;  // backward: of W by dW, after dx
};

// item_size: bytes of an element. threads: how many may work.
inline Plan make_plan(int64_t M, int64_t K, int64_t N, int64_t item_size, int64_t threads, DotMode mode = DotMode::fma,
                      PlanOptions options = {}) {
  const int64_t multiply_adds = M * K * N, bias_pieces = std::max<int64_t>(1, ceil_div(N, kBiasesPerPiece));
  if (multiply_adds <= kSmallMultiplyAdds) {
    const bool transposing_costs_more = N == 1 || kSmallDotDepth * M <= K;
    return {transposing_costs_more ? Path::dots : Path::small, Path::small, {}, {}, {bias_pieces}, false};
  }
  const int64_t pieces = std::clamp<int64_t>(multiply_adds / kMultiplyAddsPerThread, 1, threads);
  const bool at_once = options.both && !options.update && threads > 1 && multiply_adds >= kMultiplyAddsPerThread;
  const int64_t each = at_once && pieces % 2 == 0 ? pieces / 2 : pieces;  // of an odd number each has a part of both
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

  const int64_t row_bytes = N * std::max<int64_t>(item_size, 4);  // of dz, as it is accumulated
  const bool blocks_stay_in_cache = row_bytes <= kTallRowBytes && K <= kTallInputs && N * K <= kTallWeights;
  const bool rows_outweigh_sums = M >= 2 * pieces * std::max(N, K);
  if (N == 1 && K <= kOneBreadth)
    plan.backward_path = Path::one_output;
  else if (K == 1 && N <= kOneBreadth)
    plan.backward_path = Path::one_input;
  else if (blocks_stay_in_cache && rows_outweigh_sums)
    plan.backward_path = Path::tall;
  if (plan.backward_path != Path::packed) plan.grad_input = plan.grad_weight = {1, 1, pieces};
  // torch's product on a matrix unit reads beyond the end of rows of odd width.
  const bool rows_in_whole_pairs = mode != DotMode::amx || (K % 2 == 0 && N % 2 == 0);
  const bool fills_library = options.library && mode != DotMode::fma && rows_in_whole_pairs && M > 1 &&
                             K >= kLibraryInputs && N >= kLibraryOutputs &&
                             (multiply_adds >= kLibraryMultiplyAdds || N * K >= kLibraryWeights);
  const bool update_in_product = options.update && mode == DotMode::bf16_dot && plan.backward_path == Path::packed;
  if (fills_library && !update_in_product) plan.backward_path = Path::library;
  const bool forward_too = mode == DotMode::amx || K >= kLibraryDepth;
  if (forward_too && fills_library && plan.forward_path == Path::packed) plan.forward_path = Path::library;
  if (item_size == 2) {  // sums of 16-bit results wait in scratch
    plan.forward.rows = std::max(plan.forward.rows, ceil_div(M, kRowsPerPiece));
    plan.grad_input.rows = std::max(plan.grad_input.rows, ceil_div(M, kRowsPerPiece));
  }
  return plan;
}

enum class StepPath {
  blocks,  // all layers block of rows by block of rows
  panels,  // layer by layer, activations transposed
  layers,  // layer by layer, each as by itself
};
constexpr const char* step_path_name(StepPath path) {
  constexpr const char* names[] = {"blocks", "panels", "layers"};
  return names[static_cast<int>(path)];
}

// How a training step runs; pieces: of the rows, by blocks.
struct StepPlan {
  StepPath path;
  int64_t pieces;
};

// widths: of the input and of each layer. item_size: bytes of an element. threads: how many may work.
inline StepPlan make_step_plan(int64_t M, std::span<const int64_t> widths, int64_t item_size, int64_t threads,
                               DotMode mode = DotMode::fma) {
  int64_t multiply_adds = 0;  // of all layers for one row, which is also the number of weights
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
