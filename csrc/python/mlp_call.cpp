// A stack of layers in Sequential: the operator mlp with all arguments bound but the input. In C++ because converting
// the lists in Python would take longer than a small network.
#include "python/mlp_call.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "ops/mlp.h"

namespace py = pybind11;

namespace mlp_ext {

namespace {

class MlpCall {
 public:
  MlpCall(std::vector<at::Tensor> weights, const std::vector<std::optional<at::Tensor>>& biases,
          const std::vector<std::string>& activations, std::vector<double> parameters, py::object function)
      : weights_(std::move(weights)),
        biases_(biases),
        activations_(activations),
        parameters_(std::move(parameters)),
        function_(std::move(function)) {}

  py::object call(const py::object& input) const {
    // Tensor subclasses and torch function modes go through the Python call of the operator.
    if (!THPVariable_CheckExact(input.ptr()) || at::impl::torch_function_mode_enabled()) return function_(input);
    const at::Tensor& x = THPVariable_Unpack(input.ptr());
    at::Tensor y;
    {
      const py::gil_scoped_release no_gil;
      y = mlp(x, weights_, biases_, activations_, parameters_);
    }
    return py::cast(std::move(y));
  }

  const std::vector<at::Tensor>& weights() const { return weights_; }

 private:
  const std::vector<at::Tensor> weights_;
  const OptionalTensors biases_;
  const Names activations_;
  const std::vector<double> parameters_;
  const py::object function_;
};

}  // namespace

void bind_mlp_call(py::module_& m) {
  py::class_<MlpCall>(m, "MlpCall", "Layers as one call of torch.ops.mlp_ext.mlp.")
      .def(py::init<std::vector<at::Tensor>, const std::vector<std::optional<at::Tensor>>&,
                    const std::vector<std::string>&, std::vector<double>, py::object>(),
           py::arg("weights"), py::arg("biases"), py::arg("activations"), py::arg("parameters"), py::arg("function"))
      .def_property_readonly("weights", &MlpCall::weights)
      .def("__call__", torch::wrap_pybind_function(&MlpCall::call));
}

}  // namespace mlp_ext
