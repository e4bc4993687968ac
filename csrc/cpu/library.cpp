// A layer on torch's GEMMs, with one elementwise pass before or after them.
#include "cpu/library.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#include "cpu/caching_allocator.h"
#include "cpu/layer.h"
#include "cpu/variants.h"
#include "math/activations.h"
#include "ops/checks.h"

namespace mlp_ext::cpu {

namespace {

template <class Pointer>
at::Tensor tensor(const MatrixOf<Pointer>& m, int64_t rows, int64_t columns, at::ScalarType type) {
  return at::from_blob(const_cast<void*>(m.data), {rows, columns}, {m.stride, 1}, at::TensorOptions(type));
}

int64_t row_pieces(int64_t M, int64_t N, const Limits& limits) {
  return std::clamp<int64_t>(M * N / limits.elements_per_thread, 1, threads());
}

}  // namespace

// y = act(x W^T + b)
void forward_by_library(const Forward& f, const LayerKernels& kernels, DType dtype) {
  const auto type = scalar_type(dtype);
  const at::Tensor x = tensor(f.x, f.M, f.K, type), w = tensor(f.w, f.N, f.K, type);
  const Matrix z = f.z.data ? f.z : f.y;
  at::Tensor sums = tensor(z, f.M, f.N, type);
  if (f.bias)
    at::addmm_out(sums, at::from_blob(const_cast<void*>(f.bias), {f.N}, at::TensorOptions(type)), x, w.t());
  else
    at::mm_out(sums, x, w.t());
  if (is_identity(*f.activation) && !f.z.data) return;
  const int64_t pieces = row_pieces(f.M, f.N, limits_of(dtype));
  for_pieces(pieces, [&](int64_t i) { kernels.act(f, {z.data, z.stride}, piece(i, pieces, f.M)); });
}

// dz = act'(dy, saved);  dx = dz W;  dW = dz^T x;  db = sum over rows of dz
void backward_by_library(const Backward& b, const LayerKernels& kernels, DType dtype) {
  const Limits& limits = limits_of(dtype);
  const auto type = scalar_type(dtype), sums_type = dtype == DType::float64 ? at::kDouble : at::kFloat;
  const bool needs_dw = b.dw || b.update_w, needs_db = b.db || b.update_b,
             needs_dz = !is_identity(*b.activation) && (b.dx.data || needs_dw);
  const StepKernels& step = variant().step_kernels(dtype);
  const int64_t pieces = row_pieces(b.M, b.N, limits);
  const at::Tensor dz = needs_dz ? empty_cached({b.M, b.N}, type) : tensor(b.dy, b.M, b.N, type);
  const at::Tensor db = needs_db ? empty_cached({pieces, b.N}, sums_type) : at::Tensor();
  if (needs_dz || needs_db)
    for_pieces(pieces, [&](int64_t i) {
      kernels.grad_z(
          b, piece(i, pieces, b.M), needs_dz ? dz.mutable_data_ptr() : nullptr,
          needs_db ? static_cast<char*>(db.mutable_data_ptr()) + i * b.N * accumulator_size(dtype) : nullptr);
    });
  if (b.dx.data) {
    at::Tensor dx = tensor(b.dx, b.M, b.K, type);
    at::mm_out(dx, dz, tensor(b.w, b.N, b.K, type));
  }
  if (needs_dw) {
    at::Tensor dw = b.dw ? tensor(Matrix{b.dw, b.K}, b.N, b.K, type) : empty_cached({b.N, b.K}, type);
    at::mm_out(dw, dz.t(), tensor(b.x, b.M, b.K, type));
    if (b.update_w)
      for_ranges(b.N * b.K, limits.elements_per_thread, [&](int64_t begin, int64_t end) {
        step.update_rounded(*b.update_w, dw.const_data_ptr(), 1, 0, {begin, end});
      });
  }
  if (b.update_b)
    step.update(*b.update_b, db.const_data_ptr(), pieces, b.N, {0, b.N});
  else if (b.db)
    kernels.combine(db.const_data_ptr(), pieces, b.N, {0, b.N}, b.db);
}

}  // namespace mlp_ext::cpu
