#include "python/step_data.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include "math/losses.h"

namespace py = pybind11;

namespace mlp_ext {

namespace {

const at::Tensor& tensor(const py::object& given, const char* name) {
  TORCH_CHECK_TYPE(THPVariable_Check(given.ptr()), "TrainStep: ", name, " must be a tensor, got ",
                   Py_TYPE(given.ptr())->tp_name);
  const at::Tensor& t = THPVariable_Unpack(given.ptr());
  TORCH_CHECK_VALUE(!t.requires_grad(), "TrainStep: ", name, " requires a gradient, which a step does not compute; ",
                    "detach it, or use the eager loop");
  TORCH_CHECK(t.layout() == at::kStrided, "TrainStep: ", name, " must be dense, got ", t.layout(),
              "; call its to_dense()");
  return t;
}

}  // namespace

StepDataReader::StepDataReader(std::string_view loss, bool promotes, std::vector<std::pair<int64_t, int64_t>> flattened)
    : takes_classes_(loss == CrossEntropy::name || loss == NLL::name),
      promotes_(promotes),
      flattened_(std::move(flattened)) {}

StepData StepDataReader::read(const py::object& input, const py::object& target, int64_t K) const {
  StepData data = read_tensors(input, target);
  for (const auto& [start, end] : flattened_) data.input = data.input.flatten(start, end);
  if (data.input.dim() != 2) flatten_leading(data, K);
  return data;
}

StepData StepDataReader::read_for_many(const py::object& input, const py::object& target, int64_t K) const {
  StepData data = read_tensors(input, target);
  const auto flattened = [&](int64_t leading) {
    at::Tensor t = data.input;
    const auto dimension = [leading](int64_t d) { return d < 0 ? d : d + leading; };
    for (const auto& [start, end] : flattened_) t = t.flatten(dimension(start), dimension(end));
    return t;
  };
  if (flattened_.empty()) return data;
  const at::Tensor for_all = flattened(0);
  const bool is_for_all = for_all.dim() == 2 && for_all.size(1) == K;
  data.input = is_for_all || data.input.dim() < 3 ? for_all : flattened(1);
  return data;
}

StepData StepDataReader::read_tensors(const py::object& input, const py::object& target) const {
  StepData data{tensor(input, "input"), tensor(target, "target")};
  if (takes_classes_ && data.target.scalar_type() == at::kByte) data.target = data.target.to(at::kLong);
  data.promoted = promotes_ && data.target.scalar_type() == at::kDouble && data.input.scalar_type() == at::kFloat;
  if (data.promoted) data.target = data.target.to(at::kFloat);
  return data;
}

// From input [*, K] and target [*, N], or classes [*], to rows.
void StepDataReader::flatten_leading(StepData& data, int64_t K) const {
  const int64_t dim = data.input.dim();
  if (dim == 0 || data.input.size(-1) != K) return;  // the operator's error
  TORCH_CHECK_VALUE(
      dim == 1 || !takes_classes_,
      "TrainStep: the loss takes classes along dimension 1 of the output, which is not its last one for input ",
      data.input.sizes(), "; pass input.flatten(0, -2) and target.flatten()");
  const at::IntArrayRef leading = data.input.sizes().slice(0, dim - 1);
  const bool of_classes = takes_classes_ && data.target.dim() == dim - 1;
  const bool fits = data.target.dim() == dim && data.target.sizes().slice(0, dim - 1) == leading;
  TORCH_CHECK(of_classes || fits, "mlp_train_step_: target must be ", leading, " and N, got ", data.target.sizes());
  data.rows_of_one = dim == 1 ? 1 : c10::multiply_integers(leading.slice(1));
  data.input = data.input.reshape({c10::multiply_integers(leading), K});
  data.target = of_classes ? data.target.reshape(-1) : data.target.reshape({data.input.size(0), data.target.size(-1)});
}

}  // namespace mlp_ext
