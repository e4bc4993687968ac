// The kernels as the backend sees them: plain pointers in, one table of functions per instruction set.
// Included before any `#pragma GCC target`, with the standard headers that the -inl.h files need, so that no shared
// inline function is compiled for a processor that may not be there.
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

// Their functors have code for vectors: math/*.h is included after the target is set.
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

// What a dtype is accumulated in.
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
};

// A parameter that a step changes in place.
struct Update {
  void* parameter;
  void* states[3];  // of the optimizer, nullptr where it does not have them
  const Optimizer* optimizer;
};

// dz = act'(dy, saved);  dx = dz W;  dW = dz^T x;  db = sum over rows of dz
struct Backward {
  int64_t M, K, N;
  ConstMatrix dy, saved;  // [M, N]; saved: y or z, unread where the activation needs neither
  ConstMatrix x;          // [M, K], for dW
  ConstMatrix w;          // [N, K], for dx
  Matrix dx;              // [M, K] or nullptr
  void* dw;               // [N, K] or nullptr, contiguous
  void* db;               // [N] or nullptr
  const Activation* activation;
  // Where given, grad_weight does not store its results but updates with them; dw and db are its accumulators.
  const Update *update_w = nullptr, *update_b = nullptr;
};

// The loss of a network's outputs.
struct Loss {
  const LossFunction* function;
  double scale = 1;                  // of the gradient
  ConstMatrix target;                // [M, N], unless classes
  const int64_t* classes = nullptr;  // [M]
  int64_t classes_stride = 1;
  const void* weight = nullptr;  // [N] or nullptr
  int64_t ignore_index = -1;
};

// What functors do to elements, for one dtype S whose accumulators are T. All other kernels call these with a tile or
// some rows in L1, so that their own code does not grow with the lists of functors.
struct PointwiseKernels {
  // y = act(z) for z of T and y of S, [rows, columns] each. past_caches: y may be written past the caches.
  void (*act)(const Activation&, ConstMatrix z, Matrix y, int64_t rows, int64_t columns, bool past_caches);
  // dz = act'(dy, saved) for dy and saved of S and dz of T, which may be dy. Adds the sum over the rows, up to
  // kShortRows of them, to db [columns] of T where it is given.
  void (*grad_z)(const Activation&, ConstMatrix dy, ConstMatrix saved, Matrix dz, void* db, int64_t rows,
                 int64_t columns);
  // Of the rows of outputs y [rows, N] of T, without gaps: the gradient dy, times the scale; returns the sum of the
  // losses, not scaled; clears `valid` where there must be probabilities and are not. scratch: [rows + 1, N] of T.
  double (*loss)(const Loss&, Range rows, int64_t N, const void* y, void* dy, void* scratch, bool& valid);
  // The update of the elements begin + r stride + c by gradients [rows, columns] of T.
  void (*update)(const Update&, int64_t begin, int64_t stride, ConstMatrix gradients, int64_t rows, int64_t columns);
};

// The kernels of a layer, for one dtype. `scratch` holds kScratchBytes where nothing else is said, and is aligned to a
// cache line.
struct LayerKernels {
  // Whole problems on one thread, nothing packed. Need small_forward_scratch_bytes and small_backward_scratch_bytes.
  void (*small_forward)(const Forward&, void* scratch);
  void (*small_backward)(const Backward&, void* scratch);
  // Blocks of rows and columns of the result, packed, for one thread.
  void (*forward)(const Forward&, Range rows, Range columns, void* scratch);
  void (*forward_dots)(const Forward&, Range rows, Range columns, void* scratch);  // unpacked, for few rows of x or W
  void (*grad_input)(const Backward&, Range rows, Range columns, void* scratch);
  // dW and db summed over the rows `samples` into accumulators; either may be nullptr. Only columns.begin == 0 adds db.
  void (*grad_weight)(const Backward&, Range rows, Range columns, Range samples, void* dw, void* db, void* scratch);
  // The same for up to kSkinnyM rows in all, as results rather than accumulators.
  void (*grad_weight_skinny_m)(const Backward&, Range rows, Range columns, void* dw, void* db);
  // dx of the rows `samples`, and dW and db summed over them into accumulators, in one pass. Within the
  // limits of plan.h for it.
  void (*backward_tall)(const Backward&, Range samples, void* dw, void* db, void* scratch);
  void (*backward_k1)(const Backward&, Range samples, void* dw, void* db, void* scratch);
  void (*backward_n1)(const Backward&, Range samples, void* dw, void* db, void* scratch);
  // Before or after a library's GEMM: y = act(z) of some rows, for z of S, which may be y.
  void (*act)(const Forward&, const ConstMatrix& z, Range rows);
  // dz [M, N] of the rows `samples`, and db summed over them into accumulators; either may be nullptr.
  void (*grad_z)(const Backward&, Range samples, void* dz, void* db);
  // out[range] = sum in order over parts of the accumulators parts[part * size + range]
  void (*combine)(const void* parts, int64_t count, int64_t size, Range range, void* out);
};

// A layer of a training step without its update.
struct StepLayerView {
  int64_t K, N;
  ConstMatrix w;
  const void* bias;  // or nullptr
  const Activation* activation;
  int64_t dw, db;  // where the sums begin among the accumulators; -1: not needed
};
struct StepProblem {
  ConstMatrix x;
  std::span<const StepLayerView> layers;
  size_t lowest;  // layer that learns
  int64_t sums;   // accumulators
  Loss loss;
};

struct StepKernels {
  // All of a narrow network for some rows: sums of gradients to `sums`; returns the sum of the losses.
  size_t (*scratch_bytes)(const StepProblem&);
  double (*rows)(const StepProblem&, Range rows, void* sums, void* scratch, bool& valid);
  // The loss alone: the gradient [M, N] of outputs [M, N]. Needs (3 kLossRows + 1) N accumulators of scratch.
  double (*loss)(const Loss&, Range rows, int64_t N, const void* y, void* dy, void* scratch, bool& valid);
  // The update by the sum in order over parts of the accumulators parts[part * stride + range].
  void (*update)(const Update&, const void* parts, int64_t count, int64_t stride, Range range);
  void (*update_rounded)(const Update&, const void* parts, int64_t count, int64_t stride, Range range);  // parts of S
};

// A layer of a training step in panels, as step_by_layer-inl.h has them.
struct PanelLayer {
  int64_t M, K, N;   // M: not more than a block of depth
  ConstMatrix w;     // [N, K], without gaps
  const void* bias;  // [N] or nullptr
  const Activation *activation, *activation_below;
  const void* x;                      // panels of K features
  ConstMatrix rows_of_x;              // the same before packing, or nullptr
  void *y, *z, *dz;                   // panels of N features; z: or nullptr
  const void* saved_below;            // of the layer below: its y or z, panels of K features
  void* dz_below;                     // panels of K features, or nullptr
  const Update *update_w, *update_b;  // or nullptr
};

struct PanelKernels {
  int64_t (*width)();  // rows of a panel
  // Ranges of rows begin at a panel.
  void (*input)(const ConstMatrix& x, Range rows, int64_t K, void* panels);
  void (*forward)(const PanelLayer&, Range features, Range rows, void* scratch);
  double (*loss)(const Loss&, const PanelLayer&, const Activation&, Range rows, void* scratch, bool& valid);
  void (*backward)(const PanelLayer&, Range rows, Range columns, Range biases, void* scratch);
};

bool multiplies_bfloat16();  // whether the processor has AVX512_BF16

constexpr size_t kScratchBytes = size_t(5) << 20;  // per thread, whatever the shape
inline size_t small_forward_scratch_bytes(int64_t K, int64_t N) { return 8 * static_cast<size_t>(K * N + K + N); }
inline size_t small_backward_scratch_bytes(int64_t M, int64_t N) { return 8 * static_cast<size_t>(M * N); }

}  // namespace mlp_ext::cpu
