// Interface of the CPU kernels: plain pointers, one table of functions per instruction set.
// Include this before any `#pragma GCC target`, with all standard headers of the -inl.h files: shared inline functions
// must not be compiled for instructions that the processor may lack.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "cpu/plan.h"
#include "math/dtype.h"
#include "math/matrix.h"

// Forward declarations: math/*.h has vector code, so it is included after the target is set.
namespace mlp_ext {
struct Activation;
struct LossFunction;
struct Optimizer;
}  // namespace mlp_ext

namespace mlp_ext::cpu {

// 16-bit storage; arithmetic is done in float.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The type that S is accumulated in.
template <class S>
using Accumulator = std::conditional_t<sizeof(S) == 2, float, S>;

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// y = act(z),  z = x W^T + b
struct Forward {
  int64_t M, K, N;
  ConstMatrix x;     // [M, K]
  ConstMatrix w;     // [N, K]
  const void* bias;  // [N] or nullptr
  Matrix y;          // [M, N]
  Matrix z;          // [M, N] or nullptr
  const Activation* activation;
  int64_t block_bytes = kMostBlockBytes;  // of packed B
  bool x_in_place = false;                // not packed, where it need not be converted
  bool y_past_caches = false;
};

// A parameter, updated in place.
struct Update {
  void* parameter;
  void* states[3];  // optimizer states, or nullptr
  const Optimizer* optimizer;
};

// dz = act'(dy, saved);  dx = dz W;  dW = dz^T x;  db = sum over rows of dz
struct Backward {
  int64_t M, K, N;
  ConstMatrix dy, saved;  // [M, N]; saved: y or z, not read if the activation needs neither
  ConstMatrix x;          // [M, K], for dW
  ConstMatrix w;          // [N, K], for dx
  Matrix dx;              // [M, K] or nullptr
  void* dw;               // [N, K] or nullptr, contiguous
  void* db;               // [N] or nullptr
  const Activation* activation;
  // If given, grad_weight, with dw and db as its accumulators, and backward_few_rows update the parameters instead of
  // storing gradients.
  const Update *update_w = nullptr, *update_b = nullptr;
  int64_t block_bytes = kMostBlockBytes;
  bool dx_past_caches = false, dw_past_caches = false;
};

// The loss of a network's outputs.
struct Loss {
  const LossFunction* function;
  double scale = 1;                  // factor of the gradient
  ConstMatrix target;                // [M, N], if classes is nullptr
  const int64_t* classes = nullptr;  // [M]
  int64_t classes_stride = 1;
  const void* weight = nullptr;  // [N] or nullptr
  int64_t ignore_index = -1;
};

// Elementwise kernels of the functors, for a dtype S with accumulators T. Other kernels call them with a tile or a few
// rows in L1, so that their own code does not grow with the lists of functors.
struct PointwiseKernels {
  // y = act(z) for z of T and y of S, [rows, columns] each. past_caches: y may bypass the caches.
  void (*act)(const Activation&, ConstMatrix z, Matrix y, int64_t rows, int64_t columns, bool past_caches);
  // dz = act'(dy, saved) for dy and saved of S and dz of T, which may be dy. Adds the sum over the rows (up to
  // kShortRows) to db [columns] of T, if given.
  void (*grad_z)(const Activation&, ConstMatrix dy, ConstMatrix saved, Matrix dz, void* db, int64_t rows,
                 int64_t columns);
  // Writes dy, scaled, for contiguous outputs y [rows, N] of T. Returns the unscaled sum of the losses. Clears `valid`
  // if the loss needs probabilities and they are outside [0, 1]. scratch: [rows + 1, N] of T.
  double (*loss)(const Loss&, Range rows, int64_t N, const void* y, void* dy, void* scratch, bool& valid);
  // The same for networks in lanes, contiguous and of T with a number for each lane: y, dy and the target are [rows, N]
  // or, of classes, the target is [rows], negative to ignore; the weight [N]. Scales and totals, to which it adds, are
  // [lanes], as is `valid`.
  void (*loss_in_lanes)(const Loss&, bool of_classes, int64_t rows, int64_t N, const void* y, void* dy,
                        const double* scales, double* totals, bool* valid);
  // Updates the elements begin + r stride + c with gradients [rows, columns] of T.
  void (*update)(const Update&, int64_t begin, int64_t stride, ConstMatrix gradients, int64_t rows, int64_t columns);
};

// Kernels of a layer, for one dtype. `scratch` is kScratchBytes, unless noted, aligned to a cache line.
struct LayerKernels {
  // Whole layer on one thread, unpacked. Scratch: small_forward_scratch_bytes, small_backward_scratch_bytes.
  void (*small_forward)(const Forward&, void* scratch);
  void (*small_backward)(const Backward&, void* scratch);
  // One thread's block of the result, packed.
  void (*forward)(const Forward&, Range rows, Range columns, void* scratch);
  void (*forward_dots)(const Forward&, Range rows, Range columns, void* scratch);    // unpacked, for few rows of x or W
  void (*forward_narrow)(const Forward&, Range rows, Range columns, void* scratch);  // K = 1, or few K and N
  void (*grad_input)(const Backward&, Range rows, Range columns, void* scratch);
  // dW and db over the rows `samples`, as accumulators; either may be nullptr. db is computed if columns.begin == 0.
  void (*grad_weight)(const Backward&, Range rows, Range columns, Range samples, void* dw, void* db, void* scratch);
  // Rows and columns of dW, or their update, for M <= kMostFewRows; db with the first column. dx: the sums over these
  // rows as accumulators [M, K], or nullptr to store dx.
  void (*backward_few_rows)(const Backward&, Range rows, Range columns, void* dx, void* scratch);
  // dx of the rows `samples`, and dW and db over them as accumulators, in one pass. Sizes within plan.h's limits.
  void (*backward_tall)(const Backward&, Range samples, void* dw, void* db, void* scratch);
  void (*backward_narrow)(const Backward&, Range samples, void* dw, void* db, void* scratch);
  void (*backward_k1)(const Backward&, Range samples, void* dw, void* db, void* scratch);
  void (*backward_n1)(const Backward&, Range samples, void* dw, void* db, void* scratch);
  // After a library's GEMM: y = act(z) for z of S, which may be y.
  void (*act)(const Forward&, const ConstMatrix& z, Range rows);
  // Before it: dz [M, N] of the rows `samples`, and db over them as accumulators; either may be nullptr.
  void (*grad_z)(const Backward&, Range samples, void* dz, void* db);
  // out[range] = sum over p, in order, of parts[p * size + range]
  void (*combine)(const void* parts, int64_t count, int64_t size, Range range, void* out);
};

// Products in bfloat16 on tiles, packed as simd/tile_pack-inl.h says. Panels are those of a whole operand, of
// tile_panels_bytes(lines, depth), and ranges begin at multiples of kPanelSide.
constexpr int64_t kPanelSide = 32;  // rows or columns of a panel, and the depth of its two tiles
inline int64_t tile_panels_bytes(int64_t lines, int64_t depth) {
  return 2 * ceil_div(lines, kPanelSide) * kPanelSide * ceil_div(depth, kPanelSide) * kPanelSide;
}
struct TileKernels {
  void (*pack_b_transposed)(const ConstMatrix& m, Range lines, int64_t depth, void* panels);  // B = m^T, [lines, depth]
  void (*pack_b)(const ConstMatrix& m, Range lines, int64_t depth, void* panels);             // B = m, [depth, lines]
  // dz for all rows and some columns, as A for dx and as A for dW, either nullptr; adds db to totals [N], or nullptr.
  void (*pack_grad)(const Backward&, Range columns, void* dz, void* dz_transposed, double* totals);
  // Blocks of the results. w: nullptr to pack W as it is needed. Scratch: kScratchBytes.
  void (*forward)(const Forward&, const void* w, Range rows, Range columns, void* scratch);
  void (*grad_input)(const Backward&, const void* dz, const void* w, Range rows, Range columns, void* scratch);
  // partial: sums [N, K] between calls over parts of the samples, or nullptr if one call is first and last. The last
  // stores dW or updates W.
  void (*grad_weight)(const Backward&, const void* dz_transposed, const void* x, Range rows, Range columns,
                      float* partial, bool first, bool last, void* scratch);
  void (*round_db)(const double* totals, int64_t N, float* db);
};
// A part of A that stays in L2, and of the result whose sums do.
constexpr int64_t kTileRowsInL2 = 256, kTileColumnsInL2 = 1024, kTileDepthInL2 = 1024;

// A layer of a training step by blocks of rows.
struct StepLayerView {
  int64_t K, N;
  ConstMatrix w;
  const void* bias;  // or nullptr
  const Activation* activation;
  int64_t dw, db;  // offsets into the accumulators; -1: not needed
};
struct StepProblem {
  ConstMatrix x;
  std::span<const StepLayerView> layers;
  size_t lowest;  // lowest layer that learns
  int64_t sums;   // number of accumulators
  const Limits* limits;
  Loss loss;
};

struct StepKernels {
  size_t (*scratch_bytes)(const StepProblem&);  // of rows()
  // Forward, loss and backward of a narrow network for some rows. Sums gradients into `sums`; returns the loss sum.
  double (*rows)(const StepProblem&, Range rows, void* sums, void* scratch, bool& valid);
  // Loss and dy [M, N] of outputs y [M, N]. Scratch: (3 kLossRows + 1) N accumulators.
  double (*loss)(const Loss&, Range rows, int64_t N, const void* y, void* dy, void* scratch, bool& valid);
  // Updates with the sum over p, in order, of parts[p * stride + range].
  void (*update)(const Update&, const void* parts, int64_t count, int64_t stride, Range range);
  void (*update_rounded)(const Update&, const void* parts, int64_t count, int64_t stride, Range range);  // parts of S
};

// A layer of a training step on panels (see step_by_layer-inl.h).
struct PanelLayer {
  int64_t M, K, N;   // M: at most one depth block
  ConstMatrix w;     // [N, K], contiguous
  const void* bias;  // [N] or nullptr
  const Activation *activation, *activation_below;
  const void* x;                      // panels of K features
  ConstMatrix rows_of_x;              // x unpacked, or nullptr
  void *y, *z, *dz;                   // panels of N features; z may be nullptr
  const void* saved_below;            // y or z of the layer below, panels of K features
  void* dz_below;                     // panels of K features, or nullptr
  const Update *update_w, *update_b;  // or nullptr
};

struct PanelKernels {
  int64_t (*width)();  // rows per panel; all ranges of rows begin at a panel
  void (*input)(const ConstMatrix& x, Range rows, int64_t K, void* panels);
  void (*forward)(const PanelLayer&, Range features, Range rows, void* scratch);
  double (*loss)(const Loss&, const PanelLayer&, const Activation&, Range rows, void* scratch, bool& valid);
  void (*backward)(const PanelLayer&, Range rows, Range columns, Range biases, void* scratch);
};

// Training steps of networks with the same layers, one network in each lane of a vector.
struct LaneLayer {
  int64_t K, N;
  const Activation* activation;
  bool has_bias, weight_learns, bias_learns;
};
struct LaneParameter {
  void* value;                    // contiguous
  void* states[3];                // optimizer states, or nullptr
  const double* hyperparameters;  // of the optimizer, if it learns
  double count;                   // steps done before this call
};
struct LaneNetwork {
  const LaneParameter* parameters;  // [2 layers]: weight and bias of each layer
  ConstMatrix x, target;            // [input rows, K], [input rows, N]
  const int64_t* classes;           // [input rows] instead of target, or nullptr
  int64_t classes_stride;
  const int64_t* order;  // [epochs, rows] indices of input rows, or nullptr: rows in their own order
  void* losses;          // [epochs, losses_per_epoch] of S, before each update
  int64_t done;          // out: steps done; fewer than all if the loss needs probabilities and got others
};
struct LaneProblem {
  std::span<const LaneLayer> layers;  // at most kMostLayers
  size_t lowest;                      // lowest layer that learns
  const LossFunction* loss;
  bool mean;
  const void* loss_weight;               // [N] of S, or nullptr
  size_t optimizer;                      // index in Optimizers
  int64_t rows, batch, epochs;           // the same for all; batches = ceil(rows / batch)
  bool same_x, same_target, same_order;  // whether all networks have the same pointers
  int64_t losses_per_epoch;              // at least batches
};

// For float and double. Networks in one call agree in which of their hyperparameters are 0, and have the same states.
struct LaneKernels {
  int64_t (*lanes)();
  size_t (*scratch_bytes)(const LaneProblem&);
  // All steps of 1 to lanes() networks on one thread. A network's bits do not depend on the others.
  void (*train)(const LaneProblem&, std::span<LaneNetwork> networks, void* scratch);
  // As StepKernels::rows, with a row in each lane: for narrow layers.
  size_t (*rows_scratch_bytes)(const StepProblem&);
  double (*rows)(const StepProblem&, Range rows, void* sums, void* scratch, bool& valid);
};

bool multiplies_bfloat16();  // whether the processor has AVX512_BF16
bool multiplies_tiles();     // whether it has AMX for bfloat16, and the kernel allows it

constexpr size_t kScratchBytes = size_t(5) << 20;  // per thread, whatever the shape
inline size_t small_forward_scratch_bytes(int64_t K, int64_t N) { return 8 * static_cast<size_t>(K * N + K + N); }
inline size_t small_backward_scratch_bytes(int64_t M, int64_t N) { return 8 * static_cast<size_t>(M * N); }

}  // namespace mlp_ext::cpu
