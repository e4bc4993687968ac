// Guards: have the Python objects that a plan or a step depends on been modified since they were read? Also checks
// torch's global state. In C++ because every call checks it.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <vector>

namespace mlp_ext {

// A place to look for values: a dict, a list, or the attributes of an object, or a dict among those. A weakref stands
// for the object that it refers to, so that guards keep no module alive.
class Container {
 public:
  // spec: a dict or list, or a pair of an object and the name of a dict attribute, or None for all attributes.
  explicit Container(const pybind11::object& spec);
  // Borrowed references, valid until Python code runs; null, without a Python error, if there is no such dict, list or
  // element.
  PyObject* find() const;
  PyObject* find(PyObject* key) const;

  pybind11::object owner;      // the object, or the dict or list itself
  pybind11::object attribute;  // null for a dict or list
};

class Guards {
 public:
  struct Item {  // an element, by identity
    Container container;
    pybind11::object key, expected;
  };
  struct Size {
    Container container;
    int64_t expected;
  };
  struct Type {
    pybind11::object object, expected;
  };
  struct TensorItem {  // an element that is a dense tensor of this class and dtype
    Container container;
    pybind11::object key, type;
    at::ScalarType dtype;
  };
  struct ClassItem {  // an attribute that is found on the class, by identity
    pybind11::object object, name, expected;
  };

  Guards(const pybind11::iterable& items, const pybind11::iterable& sizes, const pybind11::iterable& types,
         const pybind11::iterable& tensors, const pybind11::iterable& class_items);
  bool holds() const;
  // For Python's garbage collector.
  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  std::vector<Item> items_;
  std::vector<Size> sizes_;
  std::vector<Type> types_;
  std::vector<TensorItem> tensors_;
  std::vector<ClassItem> class_items_;
};

// Lets Python's garbage collector see what a bound class holds, through its traverse and clear:
//   py::class_<T>(m, "T", collectable<T>())
template <class T>
pybind11::custom_type_setup collectable() {
  return pybind11::custom_type_setup([](PyHeapTypeObject* heap_type) {
    static const auto held = [](PyObject* self) -> T* {  // null while it is being constructed
      auto holder = reinterpret_cast<pybind11::detail::instance*>(self)->get_value_and_holder();
      return holder.holder_constructed() ? holder.value_ptr<T>() : nullptr;
    };
    PyTypeObject& type = heap_type->ht_type;
    type.tp_flags |= Py_TPFLAGS_HAVE_GC;
    type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) -> int {
      Py_VISIT(Py_TYPE(self));
      const T* const value = held(self);
      return value ? value->traverse(visit, arg) : 0;
    };
    type.tp_clear = [](PyObject* self) -> int {
      if (T* const value = held(self)) value->clear();
      return 0;
    };
  });
}

// A bit mask of the kinds of hooks that a parameter has or had.
int hooks(const at::Tensor& parameter);

// What autocast casts such a tensor to; none if it is disabled, and for float64.
std::optional<at::ScalarType> autocast_dtype(const at::Tensor& t);

// Throws if torch's global state requires something that a step does not support (table in docs/train-step.md).
void check_global_state(const at::Tensor& input, const at::Tensor& target, at::TensorList parameters);

void bind_guards(pybind11::module_& m);  // the class mlp_ext._C.Guards

}  // namespace mlp_ext
