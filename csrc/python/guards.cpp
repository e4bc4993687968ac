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
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/pybind.h>

#include "ops/checks.h"

namespace py = pybind11;

namespace mlp_ext {

namespace {

// Borrowed references below stay valid, since somebody else holds the objects and no Python code runs in between.

// The object itself, or what a weakref refers to; null if that is gone.
PyObject* referent(PyObject* object) {
  if (!object || !PyWeakref_Check(object)) return object;
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* found = nullptr;
  PyWeakref_GetRef(object, &found);
  Py_XDECREF(found);
#else
  PyObject* const found = PyWeakref_GET_OBJECT(object);
#endif
  return found == Py_None ? nullptr : found;
}

PyObject* attributes_of(PyObject* object) {
  PyObject* const found = PyObject_GenericGetDict(object, nullptr);
  if (!found) PyErr_Clear();
  Py_XDECREF(found);
  return found;
}

PyObject* item_of(PyObject* container, PyObject* key) {
  PyObject* found = nullptr;
  if (PyDict_Check(container)) {
    found = PyDict_GetItemWithError(container, key);
    if (!found) PyErr_Clear();
  } else if (PyList_Check(container)) {
    const Py_ssize_t index = PyLong_AsSsize_t(key);
    if (index < 0) PyErr_Clear();  // of a key that is no int
    if (index >= 0 && index < PyList_GET_SIZE(container)) found = PyList_GET_ITEM(container, index);
  }
  return found;
}

}  // namespace

Container::Container(const py::object& spec) {
  if (py::isinstance<py::tuple>(spec)) {
    std::tie(owner, attribute) = spec.cast<std::pair<py::object, py::object>>();
    return;
  }
  if (!PyDict_Check(spec.ptr()) && !PyList_Check(spec.ptr()))
    throw py::type_error(
        std::string("Guards: a container must be a dict, a list, or an object and an attribute, got ") +
        Py_TYPE(spec.ptr())->tp_name);
  owner = spec;
}

PyObject* Container::find() const {
  if (!attribute) return owner.ptr();
  PyObject* const object = referent(owner.ptr());
  PyObject* const attributes = object ? attributes_of(object) : nullptr;
  if (!attributes || attribute.is_none()) return attributes;
  PyObject* const found = item_of(attributes, attribute.ptr());
  return found && (PyDict_Check(found) || PyList_Check(found)) ? found : nullptr;
}

PyObject* Container::find(PyObject* key) const {
  PyObject* const container = find();
  return container ? item_of(container, key) : nullptr;
}

Guards::Guards(const py::iterable& items, const py::iterable& sizes, const py::iterable& types,
               const py::iterable& tensors, const py::iterable& class_items) {
  using py::object;
  for (const py::handle entry : items) {
    const auto [container, key, expected] = entry.cast<std::tuple<object, object, object>>();
    items_.push_back({Container(container), key, expected});
  }
  for (const py::handle entry : sizes) {
    const auto [container, expected] = entry.cast<std::pair<object, int64_t>>();
    sizes_.push_back({Container(container), expected});
  }
  for (const py::handle entry : types) {
    const auto [object, expected] = entry.cast<std::pair<py::object, py::object>>();
    types_.push_back({object, expected});
  }
  for (const py::handle entry : tensors) {
    const auto [container, key] = entry.cast<std::pair<object, object>>();
    const Container place(container);
    PyObject* const tensor = place.find(key.ptr());
    if (!tensor || !THPVariable_Check(tensor)) throw py::type_error("Guards: there is no tensor");
    tensors_.push_back({place, key, py::type::of(tensor), THPVariable_Unpack(tensor).scalar_type()});
  }
  for (const py::handle entry : class_items) {
    const auto [object, name, expected] = entry.cast<std::tuple<py::object, py::object, py::object>>();
    class_items_.push_back({object, name, expected});
  }
}

bool Guards::holds() const {
  const auto type_of = [](PyObject* object) { return reinterpret_cast<PyObject*>(Py_TYPE(object)); };
  for (const auto& [container, size] : sizes_) {
    PyObject* const c = container.find();
    if (!c || (PyDict_Check(c) ? PyDict_GET_SIZE(c) : PyList_GET_SIZE(c)) != size) return false;
  }
  for (const auto& [container, key, expected] : items_) {
    PyObject* const found = container.find(key.ptr());
    if (!found || (found != expected.ptr() && found != referent(expected.ptr()))) return false;
  }
  for (const auto& [object, expected] : types_) {
    PyObject* const found = referent(object.ptr());
    if (!found || type_of(found) != expected.ptr()) return false;
  }
  for (const auto& [container, key, type, dtype] : tensors_) {
    PyObject* const found = container.find(key.ptr());
    if (!found || type_of(found) != type.ptr()) return false;
    const at::Tensor& tensor = THPVariable_Unpack(found);
    if (tensor.scalar_type() != dtype || tensor.layout() != at::kStrided) return false;
  }
  for (const auto& [object, name, expected] : class_items_) {
    PyObject* const found = referent(object.ptr());
    if (!found) return false;
    const bool is_class = PyType_Check(found);
    PyTypeObject* const type = is_class ? reinterpret_cast<PyTypeObject*>(found) : Py_TYPE(found);
    if (_PyType_Lookup(type, name.ptr()) != expected.ptr()) return false;
    PyObject* const attributes = is_class ? nullptr : attributes_of(found);
    if (attributes && PyDict_Contains(attributes, name.ptr()) != 0) return false;
  }
  return true;
}

int Guards::traverse(visitproc visit, void* arg) const {
  for (const auto& [container, key, expected] : items_) {
    Py_VISIT(container.owner.ptr());
    Py_VISIT(key.ptr());
    Py_VISIT(expected.ptr());
  }
  for (const auto& [container, size] : sizes_) Py_VISIT(container.owner.ptr());
  for (const auto& [object, expected] : types_) {
    Py_VISIT(object.ptr());
    Py_VISIT(expected.ptr());
  }
  for (const auto& [container, key, type, dtype] : tensors_) {
    Py_VISIT(container.owner.ptr());
    Py_VISIT(type.ptr());
  }
  for (const auto& [object, name, expected] : class_items_) {
    Py_VISIT(object.ptr());
    Py_VISIT(expected.ptr());
  }
  return 0;
}

void Guards::clear() { *this = Guards(py::tuple(), py::tuple(), py::tuple(), py::tuple(), py::tuple()); }

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

std::optional<at::ScalarType> autocast_dtype(const at::Tensor& t) {
  const auto device = t.device().type();
  if (t.scalar_type() == at::kDouble || !at::autocast::is_autocast_available(device) ||
      !at::autocast::is_autocast_enabled(device))
    return std::nullopt;
  return at::autocast::get_autocast_dtype(device);
}

void check_global_state(const at::Tensor& input, const at::Tensor& target, at::TensorList parameters) {
  constexpr const char* kLeave = "; leave it, or use the eager loop";
  TORCH_CHECK(!c10::InferenceMode::is_enabled(), "TrainStep: a step trains, which inference_mode forbids", kLeave);
  TORCH_CHECK(c10::GradMode::is_enabled(), "TrainStep: gradients are disabled, as by no_grad, and a step trains",
              kLeave);
  const auto autocast = autocast_dtype(input);
  TORCH_CHECK(!autocast || input.scalar_type() == at::kFloat,
              "TrainStep: autocast is enabled, and a step follows it only with parameters of float32 or float64, got ",
              dtype_name(input.scalar_type()), kLeave);
  TORCH_CHECK(
      autocast != at::kHalf || input.is_cpu(),
      "TrainStep: autocast to float16 needs a GradScaler, which a step does not have; use bfloat16, or the eager loop");
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
  py::class_<Guards>(m, "Guards", "Whether objects have been modified since they were read.", collectable<Guards>())
      .def(py::init<const py::iterable&, const py::iterable&, const py::iterable&, const py::iterable&,
                    const py::iterable&>(),
           py::arg("items") = py::tuple(), py::arg("sizes") = py::tuple(), py::arg("types") = py::tuple(),
           py::arg("tensors") = py::tuple(), py::arg("class_items") = py::tuple())
      .def("holds", &Guards::holds);
}

}  // namespace mlp_ext
