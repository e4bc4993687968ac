#include "python/guards.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "ops/mlp.h"

namespace py = pybind11;

namespace mlp_ext {

namespace {

const py::object& dict_or_list(const py::object& container) {
  if (!PyDict_Check(container.ptr()) && !PyList_Check(container.ptr()))
    throw py::type_error(std::string("Guards: a container must be a dict or a list, got ") +
                         Py_TYPE(container.ptr())->tp_name);
  return container;
}

}  // namespace

Guards::Guards(const py::iterable& items, const py::iterable& sizes, const py::iterable& types,
               const std::vector<at::Tensor>& tensors) {
  for (const py::handle entry : items) {
    const auto [container, key, expected] = entry.cast<std::tuple<py::object, py::object, py::object>>();
    items_.push_back({dict_or_list(container), key, expected});
  }
  for (const py::handle entry : sizes) {
    const auto [container, expected] = entry.cast<std::pair<py::object, int64_t>>();
    sizes_.push_back({dict_or_list(container), expected});
  }
  for (const py::handle entry : types) {
    const auto [object, expected] = entry.cast<std::pair<py::object, py::object>>();
    types_.push_back({object, expected});
  }
  for (const at::Tensor& tensor : tensors) dtypes_.push_back({tensor, tensor.scalar_type()});
}

bool Guards::holds() const {
  for (const auto& [container, size] : sizes_) {
    PyObject* const c = container.ptr();
    if ((PyDict_Check(c) ? PyDict_GET_SIZE(c) : PyList_GET_SIZE(c)) != size) return false;
  }
  for (const auto& [container, key, expected] : items_) {
    PyObject* const c = container.ptr();
    PyObject* const found =
        PyDict_Check(c) ? PyDict_GetItemWithError(c, key.ptr()) : PyList_GetItem(c, PyLong_AsSsize_t(key.ptr()));
    if (!found) PyErr_Clear();
    if (found != expected.ptr()) return false;
  }
  for (const auto& [object, expected] : types_)
    if (reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) != expected.ptr()) return false;
  for (const auto& [tensor, expected] : dtypes_)
    if (tensor.scalar_type() != expected) return false;
  return true;
}

namespace {

// A run of layers: the operator mlp with all arguments but the input.
class Run {
 public:
  Run(std::vector<at::Tensor> weights, const std::vector<std::optional<at::Tensor>>& biases,
      const std::vector<std::string>& activations, py::object function)
      : weights_(std::move(weights)), biases_(biases), activations_(activations), function_(std::move(function)) {}

  py::object call(const py::object& input) const {
    // What may be no plain tensor, or is looked at by a mode, goes through Python's own call of the operator.
    if (!THPVariable_CheckExact(input.ptr()) || at::impl::torch_function_mode_enabled()) return function_(input);
    const at::Tensor& x = THPVariable_Unpack(input.ptr());
    at::Tensor y;
    {
      const py::gil_scoped_release no_gil;
      y = mlp(x, weights_, biases_, activations_);
    }
    return py::cast(std::move(y));
  }

  const std::vector<at::Tensor>& weights() const { return weights_; }

 private:
  const std::vector<at::Tensor> weights_;
  const OptionalTensors biases_;
  const Names activations_;
  const py::object function_;
};

}  // namespace

void bind_guards(py::module_& m) {
  py::class_<Guards>(m, "Guards", "Whether objects are still made of the parts they were made of.")
      .def(py::init<const py::iterable&, const py::iterable&, const py::iterable&, const std::vector<at::Tensor>&>(),
           py::arg("items"), py::arg("sizes"), py::arg("types") = py::tuple(),
           py::arg("tensors") = std::vector<at::Tensor>())
      .def("holds", &Guards::holds);
  py::class_<Run>(m, "Run", "A run of layers as one call of torch.ops.mlp_ext.mlp.")
      .def(py::init<std::vector<at::Tensor>, const std::vector<std::optional<at::Tensor>>&,
                    const std::vector<std::string>&, py::object>(),
           py::arg("weights"), py::arg("biases"), py::arg("activations"), py::arg("function"))
      .def_property_readonly("weights", &Run::weights)
      .def("__call__", torch::wrap_pybind_function(&Run::call));
}

}  // namespace mlp_ext
