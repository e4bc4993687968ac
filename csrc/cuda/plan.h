// Which path a shape takes on a GPU. Pure: no tensors, no device, so tests can ask it anything.
//
// Measured on one H100 (benchmarks/results/h100): paths-*.csv times each path of a single layer in a CUDA graph;
// layers-*.csv and train-*.csv time layers and training with the chosen paths. float64, TF32 and other GPUs are not
// measured.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <string_view>

#include "math/activations.h"
#include "math/dtype.h"

namespace mlp_ext::cuda {

enum class Path {
  small,   // own kernels, one launch each way: small.cuh
  tall,    // own kernels, W on chip, rows streamed once: tall.cuh
  large,   // a library's GEMMs; around them grad_z and, without an epilogue, bias_act: pointwise.cuh
  native,  // torch's operations
};
constexpr const char* kPathNames[] = {"small", "tall", "large", "native"};
constexpr const char* path_name(Path path) { return kPathNames[static_cast<int>(path)]; }

// A kernel is compiled for each of these activations, and once more for AnyActivation, which serves all others.
using TunedActivations = TypeList<Identity, ReLU, Sigmoid, Tanh>;
constexpr bool is_tuned(std::string_view activation) {
  return index_of(activation, TunedActivations{}) < TunedActivations::size;
}

// What adds bias and activation to the product of the large path.
enum class Epilogue {
  bias,       // in the product
  relu_bias,  // in the product
  cutlass,    // in the product
  pass,       // bias_act after the product: in place, or from z to y
};
constexpr const char* epilogue_name(Epilogue epilogue) {
  constexpr const char* names[] = {"bias", "relu_bias", "cutlass", "pass"};
  return names[static_cast<int>(epilogue)];
}

// What a launch is fitted to.
struct Device {
  int arch;              // 10 major + minor: 80, 90
  int processors;        // multiprocessors
  int64_t shared;        // bytes of shared memory of each
  int64_t block_shared;  // bytes of it that a block may have
};

constexpr int64_t kBlockShared = 232448;  // bytes of shared memory that a block may have, on an H100

struct Case {
  int64_t M, K, N;
  DType dtype;
  std::string_view activation;
  int arch;                       // as in Device
  bool tf32 = false;              // torch lets float32 products round their operands to TF32
  bool aligned = true;            // data and rows begin at multiples of 16 bytes
  bool cutlass = true;            // built with CUTLASS
  int64_t shared = kBlockShared;  // here
  std::optional<Path> path = {};  // instead of the table's, where it can
};

// The path of all layers instead of the table's, where it can: to measure what the table should say.
inline std::atomic<std::optional<Path>> forced_path;

// Each limit with its reason.
constexpr double kSmallMultiplyAdds = 1 << 24;    // beyond, bigger tiles win
constexpr double kSmallForward16 = 1 << 21;       // beyond, tensor cores win, forward
constexpr double kSmallBackward16 = 1 << 23;      // and backward, against three launches and more of the host's time
constexpr double kCutlassMultiplyAdds = 1 << 30;  // fewer do not fill the GPU with its tiles
constexpr int64_t kSmallTiles = 512;              // of 16 x 16 results: two for each block that a GPU holds at once
constexpr int64_t kSmallDepth = 1024;             // one block adds up K in y, M in dW
constexpr int64_t kTallWidth = 128;               // K, N: a row of dy, saved and x and their tiles in shared memory
constexpr int64_t kTallWeightBytes = 16384;       // dW in the registers of half a block
constexpr int64_t kTallRows16 = 65536;            // on tensor cores: fewer rows are too little to gain by
constexpr int64_t kTallRows = 12288;              // forward, a tile of 128 rows for most processors

constexpr bool is_16_bit(const Case& c) { return item_size(c.dtype) == 2; }
constexpr bool is_native(const Case& c) { return c.arch < 80; }
constexpr bool few_multiply_adds(const Case& c, double most) {
  return static_cast<double>(c.M) * static_cast<double>(c.K) * static_cast<double>(c.N) <= most;
}
constexpr bool narrow(const Case& c) {
  const int64_t weights = (c.K + 7) / 8 * 8 * ((c.N + 3) / 4 * 4);  // as threads share dW
  return 0 < c.K && c.K <= kTallWidth && 0 < c.N && c.N <= kTallWidth &&
         weights * accumulator_size(c.dtype) <= kTallWeightBytes;
}
// Upper bound of the shared memory of tall.cuh's backward: W, dz and x as accumulators, and the staged rows of dy,
// saved and x.
constexpr int64_t tall_backward_shared(const Case& c) {
  const int64_t K = (c.K + 7) / 8 * 8, N = (c.N + 7) / 8 * 8, rows = accumulator_size(c.dtype) == 8 ? 32 : 64;
  return accumulator_size(c.dtype) * (K * N + rows * (N + 4) + rows * K) + item_size(c.dtype) * rows * (2 * N + K);
}
constexpr bool tall_backward_fits(const Case& c) { return narrow(c) && tall_backward_shared(c) <= c.shared; }
// Whether GEMMs run on tensor cores, where K N / (K + N) multiply-adds per element moved are too few to fill them.
constexpr bool on_tensor_cores(const Case& c) { return is_16_bit(c) || c.tf32; }

template <class R, int n, class C>
constexpr const R& first_row(const R (&rows)[n], const C& c) {
  int i = 0;
  while (!rows[i].applies(c)) ++i;  // the last row always does
  return rows[i];
}

// Epilogues of the forward product, first that applies.
struct EpilogueRow {
  Epilogue epilogue;
  bool (*applies)(const Case&);
  const char* reason;
};
constexpr bool library_has_epilogue(std::string_view activation) {
  return activation == "identity" || activation == "relu";
}
constexpr EpilogueRow kEpilogues[] = {
    {Epilogue::bias, [](const Case& c) { return c.activation == "identity"; }, "cuBLASLt has it"},
    {Epilogue::relu_bias,
     [](const Case& c) { return c.activation == "relu" && c.arch == 90 && c.aligned && is_16_bit(c); },
     "cuBLASLt has it; in other kernels than these it makes 0 of NaN"},
    {Epilogue::cutlass,
     [](const Case& c) {
       return c.cutlass && c.arch == 90 && c.aligned && is_16_bit(c) && is_tuned(c.activation) &&
              !library_has_epilogue(c.activation) && !few_multiply_adds(c, kCutlassMultiplyAdds);
     },
     "no pass after the product; warp-specialised kernels are for 9.0a and 16-byte rows"},
    {Epilogue::pass, [](const Case&) { return true; }, "none: one pass"},
};

// The first row that applies is taken.
struct Row {
  Path path;
  bool (*applies)(const Case&);
  const char* reason;
};

constexpr Row kForward[] = {
    {Path::native, is_native, "not built for it"},
    {Path::small,
     [](const Case& c) {
       const int64_t tiles = (c.M + 15) / 16 * ((c.N + 15) / 16);
       return few_multiply_adds(c, is_16_bit(c) ? kSmallForward16 : kSmallMultiplyAdds) && tiles <= kSmallTiles &&
              c.K <= kSmallDepth && (c.M >= 32 || c.K <= kSmallDepth / 2);
     },
     "one launch instead of product and activation"},
    {Path::large,
     [](const Case& c) { return first_row(kEpilogues, c).epilogue == Epilogue::relu_bias && c.K + c.N > 32; },
     "one launch, on tensor cores"},
    {Path::tall,
     [](const Case& c) {
       return narrow(c) &&
              (on_tensor_cores(c) ? c.M >= kTallRows16 && c.K * c.N <= 1024 : c.M >= kTallRows && c.K <= 64);
     },
     "x read once, y written once, no pass for the activation"},
    {Path::native, [](const Case& c) { return c.dtype == DType::float64; },
     "no product has an epilogue, so as many passes as native"},
    {Path::large, [](const Case&) { return true; }, "no pass for the activation, or one in place"},
};

constexpr Row kBackward[] = {
    {Path::native, is_native, "not built for it"},
    {Path::small,
     [](const Case& c) {
       return few_multiply_adds(c, is_16_bit(c) ? kSmallBackward16 : kSmallMultiplyAdds) && c.M <= kSmallDepth &&
              c.N <= kSmallDepth / 2;
     },
     "one launch instead of activation, two products and column sum"},
    {Path::tall,
     [](const Case& c) { return tall_backward_fits(c) && (!on_tensor_cores(c) || c.M <= 16384 || c.K * c.N <= 1024); },
     "dy, saved and x read once, dx written once; dz never leaves the chip"},
    {Path::large, [](const Case&) { return true; }, "one pass for dz and db instead of two"},
};

struct Plan {
  Path forward, backward;
  const char *forward_reason, *backward_reason;
  Epilogue epilogue;  // of the large forward path
};

constexpr Plan make_plan(const Case& c) {
  const bool asked = c.path && c.arch >= 80 && (*c.path != Path::tall || tall_backward_fits(c));
  const Row of_caller{c.path.value_or(Path::native), nullptr, "asked for"};
  const Row& forward = asked ? of_caller : first_row(kForward, c);
  const Row& backward = asked ? of_caller : first_row(kBackward, c);
  return {forward.path, backward.path, forward.reason, backward.reason, first_row(kEpilogues, c).epilogue};
}

// ---- A whole training step ----

enum class StepPath {
  one_block,  // all of it, and many of them, in one launch: step.cuh
  layers,     // the layers' kernels and a loss kernel, the update by torch's operations
};
constexpr const char* step_path_name(StepPath path) { return path == StepPath::one_block ? "one_block" : "layers"; }

constexpr int kStepLayers = 8;                 // fit the kernel's argument
constexpr int kStepRows = 32;                  // on chip at a time
constexpr int64_t kStepOptimizerBytes = 2048;  // on chip
constexpr double kStepMultiplyAdds = 1 << 18;  // 39 us for 303104, as for a graph of the layers
// The same per network where each of many has a multiprocessor to itself: about 0.5 ms per step, as long as about six
// steps layer by layer. Not measured.
constexpr double kManyStepMultiplyAdds = 1 << 22;

// On chip, of a row as wide: the bias beside W, a one beside x; odd, so that neighbouring rows begin in other banks.
constexpr int64_t step_row_stride(int64_t width) { return (width + 1) | 1; }

struct StepCase {
  const int64_t* widths;  // [layers + 1]: K, and N of each layer
  int64_t layers;
  int64_t batch;  // rows of a step
  DType dtype;
  int arch;
  int64_t shared;     // bytes of shared memory that a block may have
  bool many = false;  // networks in one launch, a block each
};

constexpr bool few_step_multiply_adds(const StepCase& c) {
  double products = 0;
  for (int64_t l = 0; l < c.layers; ++l)
    products += static_cast<double>(c.batch) * static_cast<double>(c.widths[l]) * static_cast<double>(c.widths[l + 1]);
  return products <= (c.many ? kManyStepMultiplyAdds : kStepMultiplyAdds);
}
// Upper bound of the step kernel's shared memory: weights and their gradients, some rows of x, y and z of each layer,
// the optimizers, and what rounding up and the sums of warps add. z is counted whether an activation needs it or not,
// so that widths alone tell the path.
constexpr int64_t step_shared_bytes(const StepCase& c) {
  int64_t elements = kStepRows * step_row_stride(c.widths[0]);
  for (int64_t l = 0; l < c.layers; ++l) {
    elements += 2 * c.widths[l + 1] * step_row_stride(c.widths[l]);
    elements += 2 * kStepRows * step_row_stride(c.widths[l + 1]);
  }
  return elements * accumulator_size(c.dtype) + kStepOptimizerBytes + 256;
}
constexpr bool step_is_empty(const StepCase& c) {
  int64_t least = c.batch;
  for (int64_t l = 0; l <= c.layers; ++l) least = c.widths[l] < least ? c.widths[l] : least;
  return least == 0;
}

struct StepRow {
  StepPath path;
  bool (*applies)(const StepCase&);
  const char* reason;
};
constexpr StepRow kSteps[] = {
    {StepPath::layers, [](const StepCase& c) { return c.arch < 80; }, "not built for it"},
    {StepPath::layers, [](const StepCase& c) { return step_is_empty(c); }, "nothing to launch for"},
    {StepPath::layers, [](const StepCase& c) { return c.layers > kStepLayers; }, "more layers than an argument holds"},
    {StepPath::layers, [](const StepCase& c) { return !few_step_multiply_adds(c); },
     "one processor takes longer than a graph of the layers"},
    {StepPath::layers, [](const StepCase& c) { return step_shared_bytes(c) > c.shared; }, "does not fit on chip"},
    {StepPath::one_block, [](const StepCase&) { return true; }, "one launch instead of two dozen"},
};

struct StepPlan {
  StepPath path;
  const char* reason;
};
constexpr StepPlan make_step_plan(const StepCase& c) {
  const StepRow& row = first_row(kSteps, c);
  return {row.path, row.reason};
}

}  // namespace mlp_ext::cuda
