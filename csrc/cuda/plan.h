// Which path a shape takes on a GPU. Pure: no tensors, no device, so tests can ask it anything.
//
// No row is measured yet: each reason is a count of launches or of bytes.
#pragma once

#include <cstdint>
#include <string_view>

#include "dtype.h"

namespace mlp_ext::cuda {

enum class Path {
  small,   // own kernels, one launch each way: small.cuh
  tall,    // own kernels, W on chip, rows streamed once: tall.cuh
  large,   // products of a library; around them grad_z and, without an epilogue, bias_act: pointwise.cuh
  native,  // torch's operations
};
constexpr const char* path_name(Path path) {
  constexpr const char* names[] = {"small", "tall", "large", "native"};
  return names[static_cast<int>(path)];
}

// What adds bias and activation to the product of the large path.
enum class Epilogue {
  bias,       // in the product
  relu_bias,  // in the product
  cutlass,    // in the product
  pass,       // bias_act, in place, after the product
};
constexpr const char* epilogue_name(Epilogue epilogue) {
  constexpr const char* names[] = {"bias", "relu_bias", "cutlass", "pass"};
  return names[static_cast<int>(epilogue)];
}

struct Case {
  int64_t M, K, N;
  DType dtype;
  std::string_view activation;
  int arch;             // 10 major + minor: 80, 90
  bool tf32 = false;    // torch lets float32 products round their operands to TF32
  bool aligned = true;  // data and rows begin at multiples of 16 bytes
  bool cutlass = true;  // built with CUTLASS
};

// Each limit with its reason.
constexpr double kSmallProducts = 1 << 24;   // the work of few microseconds; beyond, tensor cores or bigger tiles win
constexpr int64_t kSmallDepth = 512;         // M in dW: one block adds it all up, four loads of shared memory
constexpr int64_t kSmallWidth = 4096;        // K in y, N in dx: the same, where the grid has more blocks
constexpr int64_t kTallWidth = 128;          // K, N: a row of dy, y and x and their tiles in shared memory
constexpr int64_t kTallWeightBytes = 16384;  // W and dW on chip, with room for three blocks
constexpr int64_t kTallBalance = 32;         // products per element moved at 4 bytes: 30 TFLOP/s over 3 TB/s, nearly

// K N / (K + N) products per element of x and y: beyond the balance, plain FMA takes longer than memory, and the tensor
// cores of the library win.
constexpr bool memory_bound(const Case& c) {
  const bool tensor_cores = item_size(c.dtype) == 2 || c.tf32;
  const int64_t balance = kTallBalance * item_size(c.dtype) / (tensor_cores ? 8 : 4);
  return c.K * c.N <= balance * (c.K + c.N);
}
constexpr bool narrow(const Case& c) {
  return 0 < c.K && c.K <= kTallWidth && 0 < c.N && c.N <= kTallWidth &&
         c.K * c.N * accumulator_size(c.dtype) <= kTallWeightBytes;
}
constexpr bool few_products(const Case& c) {
  return static_cast<double>(c.M) * static_cast<double>(c.K) * static_cast<double>(c.N) <= kSmallProducts;
}

// The first row that applies is taken.
struct Row {
  Path path;
  bool (*applies)(const Case&);
  const char* reason;
};

constexpr Row kForward[] = {
    {Path::native, [](const Case& c) { return c.arch < 80; }, "not built for it"},
    {Path::small, [](const Case& c) { return few_products(c) && c.K <= kSmallWidth; },
     "by count: one launch instead of product and activation"},
    {Path::tall, [](const Case& c) { return narrow(c) && memory_bound(c); },
     "by count: x read once, y written once, no pass for the activation"},
    {Path::native, [](const Case& c) { return c.dtype == DType::float64; },
     "by count: no product has an epilogue, so as many passes as native"},
    {Path::large, [](const Case&) { return true; }, "by count: no pass for the activation, or one in place"},
};

constexpr Row kBackward[] = {
    {Path::native, [](const Case& c) { return c.arch < 80; }, "not built for it"},
    {Path::small, [](const Case& c) { return few_products(c) && c.M <= kSmallDepth && c.N <= kSmallWidth; },
     "by count: one launch instead of activation, two products and column sum"},
    {Path::tall, [](const Case& c) { return narrow(c) && memory_bound(c); },
     "by count: dy, y and x read once, dx written once; dz never leaves the chip"},
    {Path::large, [](const Case&) { return true; }, "by count: one pass for dz and db instead of two"},
};

// Epilogues of the forward product, first that applies.
struct EpilogueRow {
  Epilogue epilogue;
  bool (*applies)(const Case&);
  const char* reason;
};
constexpr EpilogueRow kEpilogues[] = {
    {Epilogue::bias, [](const Case& c) { return c.activation == "identity"; }, "cuBLASLt has it"},
    {Epilogue::relu_bias, [](const Case& c) { return c.activation == "relu"; }, "cuBLASLt has it"},
    {Epilogue::cutlass, [](const Case& c) { return c.cutlass && c.arch == 90 && c.aligned && item_size(c.dtype) == 2; },
     "by count: no pass after the product; warp-specialised kernels are for 9.0a and 16-byte rows"},
    {Epilogue::pass, [](const Case&) { return true; }, "none: one pass in place"},
};

template <class R, int n, class C>
constexpr const R& first_row(const R (&rows)[n], const C& c) {
  int i = 0;
  while (!rows[i].applies(c)) ++i;  // the last row always does
  return rows[i];
}

struct Plan {
  Path forward, backward;
  const char *forward_reason, *backward_reason;
  Epilogue epilogue;  // of the large forward path
};

constexpr Plan make_plan(const Case& c) {
  const Row &forward = first_row(kForward, c), &backward = first_row(kBackward, c);
  return {forward.path, backward.path, forward.reason, backward.reason, first_row(kEpilogues, c).epilogue};
}

// ---- A whole training step ----

enum class StepPath {
  one_block,  // all of it, and many of them, in one launch: step.cuh
  layers,     // the layers' kernels, torch's loss and update
};
constexpr const char* step_path_name(StepPath path) { return path == StepPath::one_block ? "one_block" : "layers"; }

constexpr int kStepLayers = 8;  // fit the kernel's argument
constexpr int kStepRows = 32;   // on chip at a time
// By count: three times as many products, at 32 a cycle, take 30 us, as long as the two dozen launches of the layers.
constexpr double kStepProducts = 1 << 19;

// On chip, of a row as wide: the bias beside W, a one beside x; odd, so that neighbouring rows begin in other banks.
constexpr int64_t step_row_stride(int64_t width) { return (width + 1) | 1; }

struct StepCase {
  const int64_t* widths;  // [layers + 1]: K, and N of each layer
  int64_t layers;
  int64_t batch;  // rows of a step
  DType dtype;
  int arch;
  int64_t shared;  // bytes of shared memory that a block may have
};

constexpr bool few_step_products(const StepCase& c) {
  double products = 0;
  for (int64_t l = 0; l < c.layers; ++l)
    products += static_cast<double>(c.batch) * static_cast<double>(c.widths[l]) * static_cast<double>(c.widths[l + 1]);
  return products <= kStepProducts;
}
// Weights and their gradients, a few rows of each width, and what rounding the pieces up and sums of warps add.
constexpr int64_t step_shared_bytes(const StepCase& c) {
  int64_t elements = kStepRows * step_row_stride(c.widths[c.layers]);
  for (int64_t l = 0; l < c.layers; ++l) elements += (2 * c.widths[l + 1] + kStepRows) * step_row_stride(c.widths[l]);
  return elements * accumulator_size(c.dtype) + 256;
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
    {StepPath::layers, [](const StepCase& c) { return !few_step_products(c); },
     "by count: one processor takes longer than two dozen launches"},
    {StepPath::layers, [](const StepCase& c) { return step_shared_bytes(c) > c.shared; }, "does not fit on chip"},
    {StepPath::one_block, [](const StepCase&) { return true; }, "by count: one launch instead of two dozen"},
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
