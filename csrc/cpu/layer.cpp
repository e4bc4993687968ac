// One layer on raw pointers: runs the plan's path on all threads.
#include "cpu/layer.h"

#include <ATen/Context.h>
#include <c10/util/FunctionRef.h>

#include "cpu/amx.h"
#include "cpu/caching_allocator.h"
#include "cpu/library.h"
#include "cpu/plan.h"
#include "cpu/variants.h"
#include "math/activations.h"
#include "ops/checks.h"

namespace mlp_ext::cpu {

bool can_help() {
  try {
    static_cast<void>(scratch(kScratchBytes));
    return true;
  } catch (...) {
    return false;
  }
}

Range piece_of_lines(int64_t i, int64_t n, int64_t size, int64_t line) {
  const int64_t lines = ceil_div(size, line);
  return {std::min(size, i * lines / n * line), std::min(size, (i + 1) * lines / n * line)};
}

const Limits& limits_of(DType dtype) { return machine().limits(item_size(dtype), dot_mode_of(dtype)); }

namespace {

// torch's GEMM is slow for bfloat16 without oneDNN.
bool may_use_library(DType dtype) {
  return item_size(dtype) > 2 || (at::Context::hasMKLDNN() && at::globalContext().userEnabledMkldnn());
}

Plan forward_plan(int64_t M, int64_t K, int64_t N, DType dtype) {
  return make_plan({M, K, N, item_size(dtype), dot_mode_of(dtype)}, threads(), machine(),
                   {.library = may_use_library(dtype), .forward = forced_paths.forward});
}

Plan backward_plan(int64_t M, int64_t K, int64_t N, DType dtype, bool both, bool update) {
  return make_plan(
      {M, K, N, item_size(dtype), dot_mode_of(dtype)}, threads(), machine(),
      {.library = may_use_library(dtype), .both = both, .update = update, .backward = forced_paths.backward});
}

// A GEMM split into pieces. run(rows, columns, samples, s) computes one, where s is the index along the samples.
struct SplitGemm {
  Grid grid;
  int64_t rows, columns, samples;
  c10::function_ref<void(Range, Range, Range, int64_t)> run;

  // Runs share i of n of the pieces.
  void run_share(int64_t i, int64_t n) const {
    for (int64_t p = i * grid.size() / n; p < (i + 1) * grid.size() / n; ++p) {
      const int64_t c = p % grid.columns, r = p / grid.columns % grid.rows, s = p / grid.columns / grid.rows;
      run(piece_of_lines(r, grid.rows, rows), piece_of_lines(c, grid.columns, columns),
          piece_of_lines(s, grid.samples, samples), s);
    }
  }
};

// Runs the GEMMs concurrently, each on an equal share of the threads.
void run(std::initializer_list<SplitGemm> gemms) {
  int64_t shares = 1;
  for (const SplitGemm& gemm : gemms) shares = std::max(shares, gemm.grid.size());
  shares = std::min(shares, std::max<int64_t>(1, threads()));
  for_pieces(shares * static_cast<int64_t>(gemms.size()),
             [&](int64_t i) { gemms.begin()[i / shares].run_share(i % shares, shares); });
}

}  // namespace

bool takes_library(int64_t M, int64_t K, int64_t N, DType dtype, bool update) {
  return forward_plan(M, K, N, dtype).forward_path == Path::library ||
         backward_plan(M, K, N, dtype, true, update).backward_path == Path::library;
}

// y = act(x W^T + b)
namespace {

// Whether a result is written past the caches.
bool is_streamed(int64_t rows, int64_t columns, int64_t depth, DType dtype) {
  return rows * columns * item_size(dtype) >= kLargeBytes && depth <= limits_of(dtype).streamed_depth;
}

}  // namespace

void forward_layer(const Forward& given, DType dtype) {
  const int64_t M = given.M, K = given.K, N = given.N;
  Forward f = given;
  f.block_bytes = block_bytes(limits_of(dtype));
  f.x_in_place = N <= limits_of(dtype).in_place_outputs;
  f.y_past_caches = is_streamed(M, N, K, dtype);
  const LayerKernels& kernels = variant().layer_kernels(dtype);
  const Plan plan = forward_plan(M, K, N, dtype);
  if (plan.forward_path == Path::library) return forward_by_library(f, kernels, dtype);
  if (plan.forward_path == Path::amx) return forward_by_amx(f, plan.forward, variant().tile_kernels());
  if (plan.forward_path == Path::small) return kernels.small_forward(f, scratch(small_forward_scratch_bytes(K, N)));
  const bool narrow = plan.forward_path == Path::narrow || plan.forward_path == Path::one_input;
  const auto block = plan.forward_path == Path::dots ? kernels.forward_dots
                     : narrow                        ? kernels.forward_narrow
                                                     : kernels.forward;
  run({{plan.forward, M, N, 1,
        [&](Range rows, Range columns, Range, int64_t) { block(f, rows, columns, scratch(kScratchBytes)); }}});
}

namespace {

// Accumulators of dW and db. Every piece of the samples has its own if samples are split, results have 16 bits or
// parameters are updated; finish() adds them in order. Otherwise kernels write to the results.
class WeightSums {
 public:
  // update_in_epilogue: grad_weight updates, so finish() has nothing to do.
  // sums: memory for count_sums() accumulators, or nullptr if there are none.
  WeightSums(const Backward& problem, int64_t pieces, const LayerKernels& kernels, DType dtype, bool update_in_epilogue,
             void* sums)
      : problem_(problem),
        pieces_(pieces),
        kernels_(kernels),
        update_(variant().step_kernels(dtype).update),
        dw_(static_cast<char*>(problem.dw)),
        db_(static_cast<char*>(problem.db)),
        size_(problem.dw || problem.update_w ? problem.N * problem.K : 0),
        limits_(limits_of(dtype)),
        item_(accumulator_size(dtype)),
        finishes_(sums && !update_in_epilogue) {
    if (!sums) return;
    char* const begin = static_cast<char*>(sums);
    if (dw_ || problem.update_w) dw_ = begin;
    if (db_ || problem.update_b) db_ = begin + pieces * size_ * item_;
  }

  void* dw(int64_t piece) const { return dw_ ? dw_ + piece * size_ * item_ : nullptr; }
  void* db(int64_t piece) const { return db_ ? db_ + piece * problem_.N * item_ : nullptr; }

  void finish() const {
    if (!finishes_) return;
    if (dw_)
      for_ranges(size_, ceil_div(limits_.elements_per_thread, pieces_),
                 [&](int64_t begin, int64_t end) { finish(problem_.update_w, dw_, size_, {begin, end}, problem_.dw); });
    if (db_) finish(problem_.update_b, db_, problem_.N, {0, problem_.N}, problem_.db);
  }

 private:
  void finish(const Update* update, const void* parts, int64_t size, Range range, void* out) const {
    update ? update_(*update, parts, pieces_, size, range) : kernels_.combine(parts, pieces_, size, range, out);
  }

  const Backward& problem_;
  const int64_t pieces_;
  const LayerKernels& kernels_;
  decltype(StepKernels::update) update_;
  char *dw_, *db_;
  const int64_t size_;
  const Limits& limits_;
  const int64_t item_;
  const bool finishes_;
};

// dx, dW and db in one pass over the rows; each thread has its own accumulators.
void backward_in_one_pass(const Backward& problem, const Plan& plan, const LayerKernels& kernels, DType dtype,
                          void* memory) {
  const auto one_pass = plan.backward_path == Path::narrow      ? kernels.backward_narrow
                        : plan.backward_path == Path::tall      ? kernels.backward_tall
                        : plan.backward_path == Path::one_input ? kernels.backward_k1
                                                                : kernels.backward_n1;
  const WeightSums sums(problem, plan.grad_weight.samples, kernels, dtype, false, memory);
  run({{plan.grad_weight, problem.N, problem.K, problem.M, [&](Range, Range, Range samples, int64_t s) {
          one_pass(problem, samples, sums.dw(s), sums.db(s), scratch(kScratchBytes));
        }}});
  sums.finish();
}

// dx and dW in one pass over W; if its rows are split, each piece has its own sums of dx.
void backward_few_rows(const Backward& problem, const Plan& plan, const LayerKernels& kernels, DType dtype,
                       void* sums) {
  const int64_t M = problem.M, K = problem.K;
  const int64_t pieces_of_rows = plan.grad_input.samples, pieces_of_columns = plan.grad_input.columns,
                item = accumulator_size(dtype);
  char* const parts = static_cast<char*>(sums);
  for_pieces(pieces_of_rows * pieces_of_columns, [&](int64_t i) {
    const int64_t r = i / pieces_of_columns, c = i % pieces_of_columns;
    kernels.backward_few_rows(problem, piece_of_lines(r, pieces_of_rows, problem.N),
                              piece_of_lines(c, pieces_of_columns, K), parts ? parts + r * M * K * item : nullptr,
                              scratch(kScratchBytes));
  });
  for (int64_t m = 0; parts && m < M; ++m) {
    char* const row = static_cast<char*>(problem.dx.data) + m * (problem.dx.stride - K) * item_size(dtype);
    kernels.combine(parts, pieces_of_rows, M * K, {m * K, (m + 1) * K}, row);
  }
}

// dx and dW as separate GEMMs; db is computed with dW.
void backward_packed(const Backward& problem, const Plan& plan, const LayerKernels& kernels, DType dtype,
                     void* memory) {
  const int64_t M = problem.M, K = problem.K, N = problem.N;
  const WeightSums sums(problem, plan.grad_weight.samples, kernels, dtype, problem.update_w, memory);
  Backward b = problem;
  if (!problem.update_w) b.update_b = nullptr;
  const auto dx_block = [&](Range rows, Range columns, Range, int64_t) {
    kernels.grad_input(b, rows, columns, scratch(kScratchBytes));
  };
  const auto dw_block = [&](Range rows, Range columns, Range samples, int64_t s) {
    kernels.grad_weight(b, rows, columns, samples, sums.dw(s), sums.db(s), scratch(kScratchBytes));
  };
  const SplitGemm grad_input{plan.grad_input, M, K, 1, dx_block}, grad_weight{plan.grad_weight, N, K, M, dw_block};
  if (plan.concurrent_gemms) {
    run({grad_input, grad_weight});
  } else {
    if (b.dx.data) run({grad_input});
    if (sums.dw(0) || sums.db(0)) run({grad_weight});
  }
  sums.finish();
}

Plan plan_of(const Backward& b, DType dtype) {
  const bool needs_dw = b.dw || b.update_w, updates = b.update_w || b.update_b;
  Plan plan = backward_plan(b.M, b.K, b.N, dtype, b.dx.data && needs_dw, updates);
  if (!needs_dw) plan.grad_weight.columns = 1;  // db has no columns: two pieces would write the same sums
  if (plan.backward_path == Path::small && updates) plan.backward_path = Path::packed;
  return plan;
}

// Bytes of accumulators of dW and db, or of dx, where they are not summed in the results, or of packed operands.
int64_t bytes_of(const Backward& b, const Plan& plan, DType dtype) {
  const int64_t item = accumulator_size(dtype);
  const int64_t pieces = plan.grad_weight.samples, parts_of_dx = plan.grad_input.samples;
  switch (plan.backward_path) {
    case Path::library:
    case Path::small:
      return 0;
    case Path::few_rows:
      return b.dx.data && parts_of_dx > 1 ? item * parts_of_dx * b.M * b.K : 0;
    case Path::amx:
      return backward_bytes_by_amx(b);
    default:
      const bool in_results = pieces == 1 && item_size(dtype) == item && !b.update_w && !b.update_b;
      return in_results ? 0 : item * pieces * ((b.dw || b.update_w ? b.N * b.K : 0) + b.N);
  }
}

}  // namespace

bool backward_allocates(const Backward& b, DType dtype) { return plan_of(b, dtype).backward_path == Path::library; }
int64_t backward_bytes(const Backward& b, DType dtype) { return bytes_of(b, plan_of(b, dtype), dtype); }

// dz = act'(dy, saved);  dx = dz W;  dW = dz^T x;  db = sum over rows of dz
void backward_layer(const Backward& given, DType dtype, void* memory) {
  Backward problem = given;
  problem.block_bytes = block_bytes(limits_of(dtype));
  problem.dx_past_caches = is_streamed(given.M, given.K, given.N, dtype);
  problem.dw_past_caches = is_streamed(given.N, given.K, given.M, dtype);
  const LayerKernels& kernels = variant().layer_kernels(dtype);
  const Plan plan = plan_of(problem, dtype);
  const int64_t bytes = bytes_of(problem, plan, dtype);
  at::Tensor own;
  if (bytes > 0 && !memory) own = empty_cached({bytes}, at::kByte);
  void* const sums = bytes == 0 ? nullptr : memory ? memory : own.mutable_data_ptr();
  switch (plan.backward_path) {
    case Path::library:
      return backward_by_library(problem, kernels, dtype);
    case Path::amx:
      return backward_by_amx(problem, plan, variant().tile_kernels(), sums);
    case Path::narrow:
    case Path::tall:
    case Path::one_input:
    case Path::one_output:
      return in_region_if(plan.grad_weight.samples > 1,
                          [&] { backward_in_one_pass(problem, plan, kernels, dtype, sums); });
    case Path::few_rows:
      return backward_few_rows(problem, plan, kernels, dtype, sums);
    case Path::small:
      return kernels.small_backward(problem, scratch(small_backward_scratch_bytes(problem.M, problem.N)));
    default:
      return in_region_if(plan.grad_weight.size() > 1 || plan.concurrent_gemms,
                          [&] { backward_packed(problem, plan, kernels, dtype, sums); });
  }
}

}  // namespace mlp_ext::cpu
