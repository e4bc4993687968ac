// linear_act on the CPU: tensors to pointers, work to threads.
#include "linear_act.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <functional>
#include <memory>

#include "cpu/plan.h"
#include "cpu/results.h"
#include "cpu/variants.h"

namespace mlp_ext::cpu {

namespace {

DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::float32;
    case at::kDouble:
      return DType::float64;
    case at::kBFloat16:
      return DType::bfloat16;
    default:  // the checks let no other pass
      return DType::float16;
  }
}

// A tensor [*, columns] as rows of unit-stride elements; copied only where it does not lie so.
struct Rows {
  at::Tensor tensor;
  ConstMatrix matrix;

  Rows() = default;
  Rows(const at::Tensor& t, int64_t columns) {
    const bool unit_stride = t.dim() == 2 && (t.stride(1) == 1 || columns == 1);
    tensor = unit_stride ? t : t.contiguous();
    matrix = {tensor.const_data_ptr(), unit_stride ? t.stride(0) : columns};
  }
};

int64_t leading_size(const at::Tensor& t) { return c10::multiply_integers(t.sizes().slice(0, t.dim() - 1)); }

at::Tensor empty_rows_like(const at::Tensor& t, int64_t columns) {  // [*, columns]
  c10::SmallVector<int64_t, 5> sizes(t.sizes().begin(), t.sizes().end());
  sizes.back() = columns;
  return empty_result(sizes, t.scalar_type());
}

// Memory of this thread, kept for the next call.
void* scratch(size_t bytes) {
  constexpr size_t line = 64;
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t size = 0;
  if (size < bytes) {
    size = 0;
    memory.reset(std::aligned_alloc(line, (bytes + line - 1) / line * line));
    TORCH_CHECK(memory, "linear_act: no memory for ", bytes, " bytes of scratch");
    size = bytes;
  }
  return memory.get();
}

int64_t threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// Piece i of n of [0, size), cut at multiples of a cache line's elements.
Range piece(int64_t i, int64_t n, int64_t size) {
  constexpr int64_t line = 16;
  const int64_t lines = (size + line - 1) / line;
  return {std::min(size, i * lines / n * line), std::min(size, (i + 1) * lines / n * line)};
}

// A product and how it is cut: run(rows, columns, samples, which piece of the samples) computes a piece.
struct Product {
  Grid grid;
  int64_t rows, columns, samples;
  std::function<void(Range, Range, Range, int64_t)> run;

  // Share i of n of the pieces.
  void run_share(int64_t i, int64_t n) const {
    for (int64_t p = i * grid.size() / n; p < (i + 1) * grid.size() / n; ++p) {
      const int64_t c = p % grid.columns, r = p / grid.columns % grid.rows, s = p / grid.columns / grid.rows;
      run(piece(r, grid.rows, rows), piece(c, grid.columns, columns), piece(s, grid.samples, samples), s);
    }
  }
};

// All products at once, each on as many of the threads; one alone has them all.
void run(std::initializer_list<Product> products) {
  int64_t shares = 1;
  for (const Product& product : products) shares = std::max(shares, product.grid.size());
  shares = std::min(shares, std::max<int64_t>(1, threads()));
  at::parallel_for(0, shares * static_cast<int64_t>(products.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) products.begin()[i / shares].run_share(i % shares, shares);
  });
}

// y = act(x W^T + b)
at::Tensor forward(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                   std::string_view activation) {
  const size_t act = check_linear_act(input, weight, bias, activation);
  const int64_t M = leading_size(input), K = weight.size(1), N = weight.size(0);
  at::Tensor output = empty_rows_like(input, N);
  if (output.numel() == 0) return output;
  const Rows x(input, K), w(weight, K);
  const at::Tensor b = bias ? bias->contiguous() : at::Tensor();
  const Forward problem{
      M, K, N, x.matrix, w.matrix, bias ? b.const_data_ptr() : nullptr, {output.mutable_data_ptr(), N}};
  const Kernels& kernels = variant().kernels(dtype_of(input), act);
  const Plan plan = make_plan(M, K, N, input.element_size(), threads());
  if (plan.forward_path == Path::small) {
    kernels.small_forward(problem, scratch(small_scratch_bytes(M, K, N)));
  } else {
    const auto block = plan.forward_path == Path::dots ? kernels.forward_dots : kernels.forward;
    run({{plan.forward, M, N, 1,
          [&](Range rows, Range columns, Range, int64_t) { block(problem, rows, columns, scratch(kScratchBytes)); }}});
  }
  return output;
}

// Where dW and db are summed: where samples are cut or the results have 16 bits, each piece of samples has accumulators
// of its own, which are then added up in order.
class WeightSums {
 public:
  WeightSums(const Backward& problem, int64_t pieces, const Kernels& kernels, at::ScalarType dtype)
      : problem_(problem),
        pieces_(pieces),
        kernels_(kernels),
        dw_(static_cast<char*>(problem.dw)),
        db_(static_cast<char*>(problem.db)) {
    const auto accumulator = c10::elementSize(dtype) == 2 ? at::kFloat : dtype;
    item_ = static_cast<int64_t>(c10::elementSize(accumulator));
    if (pieces == 1 && accumulator == dtype) return;
    sums_ = at::empty({pieces * (size_ + problem.N)}, at::dtype(accumulator));
    char* const begin = static_cast<char*>(sums_.mutable_data_ptr());
    if (dw_) dw_ = begin;
    if (db_) db_ = begin + pieces * size_ * item_;
  }

  void* dw(int64_t piece) const { return dw_ ? dw_ + piece * size_ * item_ : nullptr; }
  void* db(int64_t piece) const { return db_ ? db_ + piece * problem_.N * item_ : nullptr; }

  void finish() const {
    if (!sums_.defined()) return;
    if (dw_)
      at::parallel_for(0, size_, kProductsPerThread, [&](int64_t begin, int64_t end) {
        kernels_.combine(dw_, pieces_, size_, {begin, end}, problem_.dw);
      });
    if (db_) kernels_.combine(db_, pieces_, problem_.N, {0, problem_.N}, problem_.db);
  }

 private:
  const Backward& problem_;
  const int64_t pieces_;
  const Kernels& kernels_;
  char *dw_, *db_;
  const int64_t size_ = problem_.dw ? problem_.N * problem_.K : 0;
  int64_t item_;
  at::Tensor sums_;
};

// dz = act'(dy, y);  dx = dz W;  dW = dz^T x;  db = sum over rows of dz
Gradients backward(const at::Tensor& grad_output, const std::optional<at::Tensor>& output,
                   const std::optional<at::Tensor>& input, const std::optional<at::Tensor>& weight,
                   std::string_view activation, std::array<bool, 3> output_mask) {
  const size_t act = check_linear_act_backward(grad_output, output, input, weight, activation, output_mask);
  const auto [needs_dx, needs_dw, needs_db] = output_mask;
  const int64_t M = leading_size(grad_output), N = grad_output.size(-1);
  const int64_t K = needs_dx ? weight->size(1) : needs_dw ? input->size(-1) : 1;
  at::Tensor dx, dw, db;
  if (needs_dx) dx = empty_rows_like(grad_output, K);
  if (needs_dw) dw = empty_result({N, K}, grad_output.scalar_type());
  if (needs_db) db = empty_result({N}, grad_output.scalar_type());

  const Rows dy(grad_output, N), y = output ? Rows(*output, N) : Rows();
  const Rows x = needs_dw ? Rows(*input, K) : Rows(), w = needs_dx ? Rows(*weight, K) : Rows();
  const auto data = [](const at::Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; };
  const Backward problem{M, K, N, dy.matrix, y.matrix, x.matrix, w.matrix, {data(dx), K}, data(dw), data(db)};
  const Kernels& kernels = variant().kernels(dtype_of(grad_output), act);
  Plan plan = make_plan(M, K, N, grad_output.element_size(), threads(), needs_dx && needs_dw);
  if (plan.backward_path == Path::small) {
    kernels.small_backward(problem, scratch(small_scratch_bytes(M, K, N)));
    return {dx, dw, db};
  }
  if (!needs_dw) plan.grad_weight.columns = 1;  // db alone has none to cut: two pieces would write the same sums
  const WeightSums sums(problem, plan.grad_weight.samples, kernels, grad_output.scalar_type());
  const Product grad_input{plan.grad_input, M, K, 1, [&](Range rows, Range columns, Range, int64_t) {
                             kernels.grad_input(problem, rows, columns, scratch(kScratchBytes));
                           }};
  const Product grad_weight{plan.grad_weight, N, K, M, [&](Range rows, Range columns, Range samples, int64_t s) {
                              kernels.grad_weight(problem, rows, columns, samples, sums.dw(s), sums.db(s),
                                                  scratch(kScratchBytes));
                            }};
  const auto one_pass = plan.backward_path == Path::tall        ? kernels.backward_tall
                        : plan.backward_path == Path::one_input ? kernels.backward_one_input
                                                                : kernels.backward_one_output;
  if (plan.backward_path != Path::packed)
    run({{plan.grad_weight, N, K, M, [&](Range, Range, Range samples, int64_t s) {
            one_pass(problem, samples, sums.dw(s), sums.db(s), scratch(kScratchBytes));
          }}});
  else if (plan.products_at_once)
    run({grad_input, grad_weight});
  else {
    if (needs_dx) run({grad_input});
    if (needs_dw || needs_db) run({grad_weight});
  }
  sums.finish();
  return {dx, dw, db};
}

}  // namespace

TORCH_LIBRARY_IMPL(mlp_ext, CPU, m) {
  m.impl("linear_act", forward);
  m.impl("_linear_act_backward", backward);
}

}  // namespace mlp_ext::cpu
