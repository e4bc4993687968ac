// What the plan knows about a processor: limits between paths, measured. Pure: no detection, so that tests can ask for
// any machine. The numbers of a machine are a file in machines/.
#pragma once

#include <cstdint>
#include <iterator>

namespace mlp_ext::cpu {

// How this processor multiplies a dtype.
enum class DotMode {
  fma,       // 16-bit types are converted to float
  bf16_dot,  // AVX512_BF16 pairs, in our kernels and in torch's library
  amx,       // the tile unit of AMX, in our kernels and in torch's library
};
constexpr const char* kDotModes[] = {"fma", "bf16_dot", "amx"};

constexpr int64_t kNever = int64_t(1) << 62;     // a limit that no shape reaches
constexpr int64_t kMostEach = int64_t(1) << 40;  // the same, for one that is multiplied by the number of threads

// Bounds of the workspace: limits may be lower, not higher.
constexpr int64_t kTallRowBytes = 2048;       // a row of dz fits one depth block
constexpr int64_t kTallInputs = 1024;         // K of tall
constexpr int64_t kTallWeights = 1 << 18;     // N K of tall; each thread has its own dW
constexpr int64_t kOneBreadth = 1 << 16;      // N of one_input, K of one_output
constexpr int64_t kMostFewRows = 16;          // M of few_rows
constexpr int64_t kNarrowBytes = 64;          // a row of x or z of narrow, as accumulated
constexpr int64_t kDepthBytes = 2048;         // depth block of A; half of it writes partial sums twice as often
constexpr int64_t kLargeBytes = 8 << 20;      // too large to stay in the caches until it is read
constexpr int64_t kMostBlockBytes = 1 << 21;  // block of packed B
constexpr int64_t kLeastBlockBytes = 1 << 17;
constexpr int64_t kStepRowBytes = kDepthBytes;    // widest layer of StepPath::blocks; tiles cover the whole depth
constexpr int64_t kMostPanelBytes = kDepthBytes;  // M of StepPath::panels; dW takes one depth block

// Limits between paths, for one way of multiplying. Shapes are MxKxN. The defaults are the numbers of generic.h.
struct Limits {
  // small and dots
  int64_t small_multiply_adds = 1 << 12;       // M K N; above, packing pays off
  int64_t multiply_adds_per_thread = 1 << 17;  // below, waking a thread costs more than it saves
  int64_t small_dot_depth = 8;                 // K / M; from here on small layers use dots: no transposed W
  int64_t dot_rows = 16;                       // M; up to here transposing W costs as much as the GEMM
  int64_t dot_rows_if_deep = 64;               // M if K >= dot_depth M
  int64_t dot_depth = 12;                      // K / M
  int64_t dot_columns = 4;                     // N; up to here tiles are mostly empty
  int64_t tiny_depth = 24;                     // K; up to here tiles still beat dots
  // narrow
  int64_t narrow_bytes = kNarrowBytes;  // a row of x or z; above, tiles are full enough
  int64_t narrow_rows = 128;            // M of backward; below, tall or small
  // tall
  int64_t tall_inputs = kTallInputs;    // K; a block of x stays in L2
  int64_t tall_weights = kTallWeights;  // N K; above, dW of each thread leaves the cache
  int64_t few_rows = 8;                 // M; up to here backward is bound by memory
  // library, torch's GEMM, from these sizes on
  int64_t library_multiply_adds = kNever;  // M K N
  int64_t library_weights = kNever;        // N K; alternative to M K N for few rows
  int64_t library_inputs = 24;             // K; below, tall wins
  int64_t library_outputs = 16;            // N; below, tall wins
  int64_t library_forward_inputs = 1024;   // K; forward gains only from here
  // amx, from these sizes on
  int64_t amx_rows = 16;              // M; below, dots or few_rows
  int64_t amx_inputs = 16;            // K of forward
  int64_t amx_outputs = 4;            // N of forward; tiles are mostly empty, but dots read x as slowly
  int64_t amx_backward_columns = 32;  // K and N of backward; below, tall reads each operand once
  // packed
  int64_t in_place_outputs = 32;  // N of forward; up to here x is not packed, since each element is read once
  int64_t block_bytes = 0;        // of a block of packed B; 0: half of L2
  // all
  int64_t streamed_depth = kNever;  // terms of each sum of a large result; up to here it is written past the caches
  // training steps
  int64_t step_width = kStepRowBytes / 4;  // blocks: widest layer
  int64_t step_weights = 1 << 18;          // blocks: each thread packs them twice and has its own gradients
  int64_t step_rows = 32;                  // blocks: M per thread; below, adding the gradients costs more
  int64_t row_lane_weights = 1 << 8;       // lanes: weights; above, blocks fill vectors as well
  int64_t row_lane_bytes = 64;             // lanes: M per thread, in bytes of a column; below, lanes are empty
  int64_t panel_rows = 32;                 // panels: fewest M
  int64_t panel_rows_per_empty_lane = 16;  // panels: M / empty lanes of the last vector
  int64_t panel_columns = 32;              // panels: columns of W per thread
  // many networks
  int64_t lane_weights = 1 << 11;        // lanes: weights of a network; those of all lanes stay in L2
  int64_t core_multiply_adds = 1 << 27;  // cores: M K N of a step; above, threads share a network
  // losses and copies
  int64_t elements_per_thread = 1 << 12;  // copied, or outputs with a loss

  // N is so small that lanes along K (dots) beat tiles with lanes along N.
  constexpr bool tiles_mostly_empty(int64_t K, int64_t N) const {
    return N == 1 || (N <= dot_columns && K > tiny_depth);
  }
};

// A limit by name, with its range.
struct Limit {
  const char* name;
  int64_t Limits::* value;
  int64_t least, most;
};
constexpr Limit kLimits[] = {
    {"small_multiply_adds", &Limits::small_multiply_adds, 0, 1 << 16},
    {"multiply_adds_per_thread", &Limits::multiply_adds_per_thread, 1, kMostEach},
    {"small_dot_depth", &Limits::small_dot_depth, 0, 1 << 20},
    {"dot_rows", &Limits::dot_rows, 0, kNever},
    {"dot_rows_if_deep", &Limits::dot_rows_if_deep, 0, kNever},
    {"dot_depth", &Limits::dot_depth, 0, 1 << 20},
    {"dot_columns", &Limits::dot_columns, 0, kNever},
    {"tiny_depth", &Limits::tiny_depth, 0, kNever},
    {"narrow_bytes", &Limits::narrow_bytes, 0, kNarrowBytes},
    {"narrow_rows", &Limits::narrow_rows, 0, kNever},
    {"tall_inputs", &Limits::tall_inputs, 0, kTallInputs},
    {"tall_weights", &Limits::tall_weights, 0, kTallWeights},
    {"few_rows", &Limits::few_rows, 0, kMostFewRows},
    {"library_multiply_adds", &Limits::library_multiply_adds, 0, kNever},
    {"library_weights", &Limits::library_weights, 0, kNever},
    {"library_inputs", &Limits::library_inputs, 1, kNever},
    {"library_outputs", &Limits::library_outputs, 1, kNever},
    {"library_forward_inputs", &Limits::library_forward_inputs, 0, kNever},
    {"amx_rows", &Limits::amx_rows, 0, kNever},
    {"amx_inputs", &Limits::amx_inputs, 0, kNever},
    {"amx_outputs", &Limits::amx_outputs, 0, kNever},
    {"amx_backward_columns", &Limits::amx_backward_columns, 0, kNever},
    {"in_place_outputs", &Limits::in_place_outputs, 0, kNever},
    {"block_bytes", &Limits::block_bytes, 0, kMostBlockBytes},
    {"streamed_depth", &Limits::streamed_depth, 0, kNever},
    {"step_width", &Limits::step_width, 0, kStepRowBytes / 4},
    {"step_weights", &Limits::step_weights, 0, 1 << 22},
    {"step_rows", &Limits::step_rows, 1, kMostEach},
    {"row_lane_weights", &Limits::row_lane_weights, 0, 1 << 16},
    {"row_lane_bytes", &Limits::row_lane_bytes, 0, kMostEach},
    {"panel_rows", &Limits::panel_rows, 1, kNever},
    {"panel_rows_per_empty_lane", &Limits::panel_rows_per_empty_lane, 0, 1 << 20},
    {"panel_columns", &Limits::panel_columns, 1, kMostEach},
    {"lane_weights", &Limits::lane_weights, 0, 1 << 20},
    {"core_multiply_adds", &Limits::core_multiply_adds, 0, kNever},
    {"elements_per_thread", &Limits::elements_per_thread, 1, kNever},
};
static_assert(sizeof(Limits) == std::size(kLimits) * sizeof(int64_t), "each limit needs a line in kLimits");

struct Machine {
  const char* name;
  DotMode bfloat16;  // how it multiplies bfloat16
  Limits fma;        // float32 and float64
  Limits converted;  // 16-bit types by fma
  Limits bf16_dot;
  Limits amx;

  // item_size: bytes per element.
  constexpr const Limits& limits(int64_t item_size, DotMode mode) const {
    return mode == DotMode::bf16_dot ? bf16_dot : mode == DotMode::amx ? amx : item_size == 2 ? converted : fma;
  }
};
constexpr struct {
  const char* name;
  Limits Machine::* limits;
} kModes[] = {{"fma", &Machine::fma},
              {"converted", &Machine::converted},
              {"bf16_dot", &Machine::bf16_dot},
              {"amx", &Machine::amx}};

}  // namespace mlp_ext::cpu
