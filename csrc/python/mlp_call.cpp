// A run of layers: the operators linear_act and mlp with all arguments bound but the input. In C++ because converting
// the lists in Python would take longer than a small network.
#include "python/mlp_call.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "ops/linear_act.h"
#include "ops/mlp.h"
#include "python/guards.h"

namespace py = pybind11;

namespace mlp_ext {

namespace {

class MlpCall {
 public:
  // layers: weakrefs of the modules, whose parameters are read at each call.
  MlpCall(const std::vector<py::object>& layers, const std::vector<std::string>& activations,
          std::vector<double> parameters, py::object function)
      : activations_(activations), parameters_(std::move(parameters)), function_(std::move(function)) {
    for (const py::object& layer : layers) layers_.emplace_back(py::make_tuple(layer, "_parameters"));
  }

  py::object call(const py::object& input) const {
    // Tensor subclasses and torch function modes go through the Python call of the operator.
    if (!THPVariable_CheckExact(input.ptr()) || at::impl::torch_function_mode_enabled())
      return function_(weights(), biases(), input);
    const at::Tensor& x = THPVariable_Unpack(input.ptr());
    at::Tensor y;
    if (layers_.size() == 1) {
      const at::Tensor weight = tensor(layers_[0], names().weight).value();
      const std::optional<at::Tensor> bias = tensor(layers_[0], names().bias);
      const py::gil_scoped_release no_gil;
      y = linear_act(x, weight, bias, name_at(activations_, 0), parameters_);
    } else {
      const std::vector<at::Tensor> weights = this->weights();
      const OptionalTensors biases(this->biases());
      const py::gil_scoped_release no_gil;
      y = mlp(x, weights, biases, activations_, parameters_);
    }
    return py::cast(std::move(y));
  }

  std::vector<at::Tensor> weights() const {
    std::vector<at::Tensor> weights;
    for (const Container& layer : layers_) weights.push_back(tensor(layer, names().weight).value());
    return weights;
  }
  std::vector<std::optional<at::Tensor>> biases() const {
    std::vector<std::optional<at::Tensor>> biases;
    for (const Container& layer : layers_) biases.push_back(tensor(layer, names().bias));
    return biases;
  }

 private:
  struct ParameterNames {  // never freed: the interpreter may be gone
    const py::handle weight = PyUnicode_InternFromString("weight"), bias = PyUnicode_InternFromString("bias");
  };
  static const ParameterNames& names() {
    static const ParameterNames names;
    return names;
  }

  static std::optional<at::Tensor> tensor(const Container& layer, py::handle name) {
    PyObject* const found = layer.find(name.ptr());
    if (found && THPVariable_Check(found)) return THPVariable_Unpack(found);
    TORCH_CHECK(found == Py_None && name.is(names().bias), "a layer's parameters changed during its call");
    return std::nullopt;
  }

  std::vector<Container> layers_;
  const Names activations_;
  const std::vector<double> parameters_;
  const py::object function_;
};

}  // namespace

void bind_mlp_call(py::module_& m) {
  py::class_<MlpCall>(m, "MlpCall", "Layers as one call of torch.ops.mlp_ext.linear_act or mlp.")
      .def(py::init<const std::vector<py::object>&, const std::vector<std::string>&, std::vector<double>, py::object>(),
           py::arg("layers"), py::arg("activations"), py::arg("parameters"), py::arg("function"))
      .def_property_readonly("weights", &MlpCall::weights)
      .def("__call__", torch::wrap_pybind_function(&MlpCall::call));
}

}  // namespace mlp_ext
