#include "python/guards.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/autocast_mode.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <pybind11/stl.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/anomaly_mode.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/pybind.h>

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

int hooks(const at::Tensor& parameter) {
  const auto* const autograd = torch::autograd::impl::get_autograd_meta(parameter);
  return autograd ? !autograd->hooks_.empty() + 2 * (autograd->post_acc_grad_hooks_ != nullptr) : 0;
}

namespace {

// Throws if a torch function mode is active, since it would see no calls. torch.set_default_device is a mode, too, but
// only affects new tensors.
void check_function_modes() {
  static const py::object& default_device =  // never freed: the interpreter may be gone
      *new py::object(py::module_::import("torch.utils._device").attr("DeviceContext"));
  for (int64_t i = 0; i < at::impl::PythonTorchFunctionTLS::stack_len(); ++i) {
    const py::handle mode = at::impl::PythonTorchFunctionTLS::get_stack_at(i)->ptr(getPyInterpreter());
    TORCH_CHECK(py::isinstance(mode, default_device), "TrainStep: a ", Py_TYPE(mode.ptr())->tp_name,
                " is active, and a step makes no calls of torch functions for it to see; leave it, or use the eager "
                "loop");
  }
}

}  // namespace

void check_global_state(const at::Tensor& input, const at::Tensor& target, at::TensorList parameters) {
  constexpr const char* kLeave = "; leave it, or use the eager loop";
  TORCH_CHECK(!c10::InferenceMode::is_enabled(), "TrainStep: a step trains, which inference_mode forbids", kLeave);
  TORCH_CHECK(c10::GradMode::is_enabled(), "TrainStep: gradients are disabled, as by no_grad, and a step trains",
              kLeave);
  const auto device = input.device().type();
  TORCH_CHECK(!at::autocast::is_autocast_available(device) || !at::autocast::is_autocast_enabled(device),
              "TrainStep: autocast is enabled, and a step would not follow it", kLeave);
  TORCH_CHECK(!torch::autograd::AnomalyMode::is_enabled(),
              "TrainStep: anomaly detection is on, and a step does not look for NaN", kLeave);
  TORCH_CHECK(!at::SavedTensorDefaultHooks::get_hooks(),
              "TrainStep: saved-tensor hooks are set, and a step saves no tensor to call them with", kLeave);
  TORCH_CHECK(!c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode),
              "TrainStep: a step changes parameters in place, which torch.func's transforms cannot follow", kLeave);
  if (torch::autograd::ForwardADLevel::try_get_by_idx(0)) {
    const auto has_tangent = [](const at::Tensor& t) { return t._fw_grad(0).defined(); };
    TORCH_CHECK(
        !has_tangent(input) && !has_tangent(target) && std::none_of(parameters.begin(), parameters.end(), has_tangent),
        "TrainStep: input, target or a parameter has a forward-mode tangent, which a step would drop", kLeave);
  }
  if (at::impl::torch_function_mode_enabled()) check_function_modes();
}

void bind_guards(py::module_& m) {
  py::class_<Guards>(m, "Guards", "Whether objects have been modified since they were read.")
      .def(py::init<const py::iterable&, const py::iterable&, const py::iterable&, const std::vector<at::Tensor>&>(),
           py::arg("items"), py::arg("sizes"), py::arg("types") = py::tuple(),
           py::arg("tensors") = std::vector<at::Tensor>())
      .def("holds", &Guards::holds);
}

}  // namespace mlp_ext
