// linear_act on a GPU: tensors to pointers, the plan's path to launches on the current stream.
#include "ops/linear_act.h"

#include <ATen/Context.h>
#include <ATen/ops/_addmm_activation.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <limits>

#include "cuda/tensors.h"
#include "math/activations.h"

namespace mlp_ext::cuda {

namespace {

at::Tensor empty_rows_like(const at::Tensor& t, int64_t columns) {  // [*, columns]
  c10::SmallVector<int64_t, 5> sizes(t.sizes().begin(), t.sizes().end());
  sizes.back() = columns;
  return at::empty(sizes, t.options().memory_format(std::nullopt));
}

Plan plan(int64_t M, int64_t K, int64_t N, const at::Tensor& t, std::string_view activation, bool aligned) {
  const auto precision = at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL);
  const bool tf32 = precision == at::Float32Precision::TF32;
  const Device& here = device();
  return make_plan({M, K, N, dtype_of(t), activation, here.arch, tf32, aligned, MLP_EXT_CUTLASS, here.block_shared,
                    forced_path.load()});
}

// Whether rows are whole multiples of 16 bytes, begin at such, and do not overlap.
bool aligned(const at::Tensor& t) {
  const int64_t elements = 16 / t.element_size(), columns = t.size(-1);
  const int64_t stride = t.dim() == 1 ? columns : t.stride(0);
  const bool begin = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  return begin && columns % elements == 0 && stride % elements == 0 && stride >= columns;
}

// y = act(x W^T + b), and z = x W^T + b if stores_z, which holds for activations whose backward needs it alone
Outputs forward(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                std::string_view name, const Activation& activation, bool stores_z) {
  const Guard guard(input);
  const int64_t M = leading_size(input), K = weight.size(1), N = weight.size(0);
  const at::Tensor x = as_rows(input, M, K), w = as_rows(weight, N, K), b = bias ? bias->contiguous() : at::Tensor();
  const bool whole = aligned(x) && aligned(w) && (!bias || aligned(b)) && N * x.element_size() % 16 == 0;
  const Plan chosen = plan(M, K, N, x, name, whole && std::max({M, K, N}) <= std::numeric_limits<int>::max());
  const bool empty_sum = K == 0;  // libraries refuse it, or leave the activation out
  if (chosen.forward == Path::native || empty_sum) return linear_then_act(input, weight, bias, activation);

  const at::Tensor output = empty_rows_like(input, N);
  const at::Tensor preactivation = stores_z ? empty_rows_like(input, N) : at::Tensor();
  const ForwardProblem problem{dtype_of(x),
                               activation,
                               M,
                               K,
                               N,
                               matrix(x),
                               matrix(w),
                               matrix(b).data,
                               {data(output), N},
                               {data(preactivation), N}};
  const Gpu here = gpu();
  switch (chosen.forward) {
    case Path::small:
      C10_CUDA_CHECK(launch_small_forward(problem, here));
      break;
    case Path::tall:
      C10_CUDA_CHECK(launch_tall_forward(problem, here));
      break;
    default: {
      at::Tensor result = (stores_z ? preactivation : output).view({M, N});
      const Epilogue epilogue = stores_z ? Epilogue::pass : chosen.epilogue;
      switch (epilogue) {
        case Epilogue::relu_bias:
          at::_addmm_activation_out(result, bias ? b : at::zeros({N}, result.options()), x, w.t());
          break;
#if MLP_EXT_CUTLASS
        case Epilogue::cutlass:
          C10_CUDA_CHECK(launch_sm90_forward(problem, here));
          break;
#endif
        default:
          bias ? at::addmm_out(result, b, x, w.t()) : at::mm_out(result, x, w.t());
          if (epilogue == Epilogue::pass) C10_CUDA_CHECK(launch_act(problem, here));
      }
    }
  }
  return {output, preactivation};
}

at::Tensor linear_act(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                      std::string_view activation, at::ArrayRef<double> parameters) {
  const Activation act = check_linear_act(input, weight, bias, activation, parameters);
  return std::get<0>(forward(input, weight, bias, activation, act, /*stores_z=*/false));
}

Outputs linear_act_forward(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                           std::string_view activation, at::ArrayRef<double> parameters) {
  const Activation act = check_linear_act(input, weight, bias, activation, parameters);
  if (needs_of(act) != Needs::preactivation) return linear_then_act(input, weight, bias, act);
  return forward(input, weight, bias, activation, act, /*stores_z=*/true);
}

// dz = act'(dy, saved);  dx = dz W;  dW = dz^T x;  db = sum over rows of dz
LayerGradients linear_act_backward(const at::Tensor& grad_output, const std::optional<at::Tensor>& saved,
                                   const std::optional<at::Tensor>& input, const std::optional<at::Tensor>& weight,
                                   std::string_view activation, at::ArrayRef<double> parameters,
                                   std::array<bool, 3> output_mask) {
  const Activation act =
      check_linear_act_backward(grad_output, saved, input, weight, activation, parameters, output_mask);
  const auto [needs_dx, needs_dw, needs_db] = output_mask;
  const Guard guard(grad_output);
  const int64_t M = leading_size(grad_output), N = grad_output.size(-1);
  const int64_t K = needs_dx ? weight->size(1) : needs_dw ? input->size(-1) : 1;
  const Path path = plan(M, K, N, grad_output, activation, false).backward;
  if (path == Path::native)
    return linear_act_backward_native(grad_output, saved, input, weight, activation, parameters, output_mask);

  at::Tensor dx, dw, db;
  if (needs_dx) dx = empty_rows_like(grad_output, K);
  if (needs_dw) dw = at::empty({N, K}, grad_output.options());
  if (needs_db) db = at::empty({N}, grad_output.options());
  const bool linear = needs_of(act) == Needs::nothing;  // then dz is dy: the only such activation is the identity
  const at::Tensor dy = as_rows(grad_output, M, N), y_or_z = linear ? at::Tensor() : as_rows(*saved, M, N);
  const at::Tensor x = needs_dw ? as_rows(*input, M, K) : at::Tensor();
  const at::Tensor w = needs_dx ? as_rows(*weight, N, K) : at::Tensor();
  const BackwardProblem problem{
      dtype_of(dy), act, M, K, N, matrix(dy), matrix(y_or_z), matrix(x), matrix(w), {data(dx), K}, data(dw), data(db)};
  const Gpu here = gpu();
  switch (path) {
    case Path::small:
      C10_CUDA_CHECK(launch_small_backward(problem, here));
      break;
    case Path::tall: {
      const at::Tensor workspace = bytes(tall_backward_bytes(problem, here), dy);
      C10_CUDA_CHECK(launch_tall_backward(problem, data(workspace), here));
      break;
    }
    default: {
      const bool needs_dz = !linear && (needs_dx || needs_dw);
      const at::Tensor dz = needs_dz ? at::empty({M, N}, dy.options()) : dy;
      if (needs_dz || needs_db) {
        const at::Tensor workspace = bytes(grad_z_bytes(problem, here), dy);
        C10_CUDA_CHECK(launch_grad_z(problem, needs_dz ? data(dz) : nullptr, data(workspace), here));
      }
      if (needs_dx) {
        at::Tensor rows = dx.view({M, K});
        at::mm_out(rows, dz, w);
      }
      if (needs_dw) at::mm_out(dw, dz.t(), x);
    }
  }
  return {dx, dw, db};
}

}  // namespace

TORCH_LIBRARY_IMPL(mlp_ext, CUDA, m) {
  m.impl("linear_act", with_optional_parameters<linear_act>);
  m.impl("_linear_act_forward", linear_act_forward);
  m.impl("_linear_act_backward", linear_act_backward);
}

}  // namespace mlp_ext::cuda
