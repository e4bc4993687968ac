// linear_act on the CPU: from tensors to pointers.
#include "ops/linear_act.h"

#include <torch/library.h>

#include "cpu/caching_allocator.h"
#include "cpu/layer.h"
#include "ops/checks.h"

namespace mlp_ext::cpu {

namespace {

// A tensor [*, columns] as rows of unit-stride elements; copied if its layout differs.
struct UnitStrideRows {
  at::Tensor tensor;
  ConstMatrix matrix;

  UnitStrideRows() = default;
  UnitStrideRows(const at::Tensor& t, int64_t columns) {
    const bool in_place = t.dim() == 2 && has_unit_stride(t);
    tensor = in_place ? t : t.contiguous();
    matrix = {tensor.const_data_ptr(), in_place ? t.stride(0) : columns};
  }
};

at::Tensor empty_rows_like(const at::Tensor& t, int64_t columns) {  // [*, columns]
  c10::SmallVector<int64_t, 5> sizes(t.sizes().begin(), t.sizes().end());
  sizes.back() = columns;
  return empty_cached(sizes, t.scalar_type());
}

void* data(const at::Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

// y = act(x W^T + b), and z = x W^T + b into `z`, if defined, which holds for activations whose backward needs it alone
void forward(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
             const Activation& activation, const at::Tensor& y, const at::Tensor& z) {
  const int64_t M = leading_size(input), K = weight.size(1), N = weight.size(0);
  if (y.numel() == 0) return;
  const UnitStrideRows x(input, K), w(weight, K);
  const at::Tensor b = bias ? bias->contiguous() : at::Tensor();
  forward_layer(
      {M, K, N, x.matrix, w.matrix, bias ? b.const_data_ptr() : nullptr, {data(y), N}, {data(z), N}, &activation},
      dtype_of(input));
}

at::Tensor linear_act(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                      std::string_view activation, at::ArrayRef<double> parameters) {
  const Activation act = check_linear_act(input, weight, bias, activation, parameters);
  const at::Tensor y = empty_rows_like(input, weight.size(0));
  forward(input, weight, bias, act, y, {});
  return y;
}

Outputs linear_act_forward(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                           std::string_view activation, at::ArrayRef<double> parameters) {
  const Activation act = check_linear_act(input, weight, bias, activation, parameters);
  if (needs_of(act) != Needs::preactivation) return linear_then_act(input, weight, bias, act);
  const at::Tensor y = empty_rows_like(input, weight.size(0)), z = empty_rows_like(input, weight.size(0));
  forward(input, weight, bias, act, y, z);
  return {y, z};
}

// dz = act'(dy, saved);  dx = dz W;  dW = dz^T x;  db = sum over rows of dz
LayerGradients linear_act_backward(const at::Tensor& grad_output, const std::optional<at::Tensor>& saved,
                                   const std::optional<at::Tensor>& input, const std::optional<at::Tensor>& weight,
                                   std::string_view activation, at::ArrayRef<double> parameters,
                                   std::array<bool, 3> output_mask) {
  const Activation act =
      check_linear_act_backward(grad_output, saved, input, weight, activation, parameters, output_mask);
  const auto [needs_dx, needs_dw, needs_db] = output_mask;
  const int64_t M = leading_size(grad_output), N = grad_output.size(-1);
  const int64_t K = needs_dx ? weight->size(1) : needs_dw ? input->size(-1) : 1;
  at::Tensor dx, dw, db;
  if (needs_dx) dx = empty_rows_like(grad_output, K);
  if (needs_dw) dw = empty_cached({N, K}, grad_output.scalar_type());
  if (needs_db) db = empty_cached({N}, grad_output.scalar_type());

  const UnitStrideRows dy(grad_output, N), y_or_z = saved ? UnitStrideRows(*saved, N) : UnitStrideRows();
  const UnitStrideRows x = needs_dw ? UnitStrideRows(*input, K) : UnitStrideRows(),
                       w = needs_dx ? UnitStrideRows(*weight, K) : UnitStrideRows();
  backward_layer({M, K, N, dy.matrix, y_or_z.matrix, x.matrix, w.matrix, {data(dx), K}, data(dw), data(db), &act},
                 dtype_of(grad_output));
  return {dx, dw, db};
}

}  // namespace

TORCH_LIBRARY_IMPL(mlp_ext, CPU, m) {
  m.impl("linear_act", with_optional_parameters<linear_act>);
  m.impl("_linear_act_forward", linear_act_forward);
  m.impl("_linear_act_backward", linear_act_backward);
}

}  // namespace mlp_ext::cpu
