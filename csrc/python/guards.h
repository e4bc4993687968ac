// Guards: have the Python objects that a step depends on been modified since they were read? Also checks torch's global
// state. In C++ because every call checks it.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <vector>

namespace mlp_ext {

class Guards {
 public:
  struct Item {  // the identity of an element of a dict or list
    pybind11::object container, key, expected;
  };
  struct Size {  // the length of a dict or list
    pybind11::object container;
    int64_t expected;
  };
  struct Type {  // the class of an object
    pybind11::object object, expected;
  };
  struct Dtype {
    at::Tensor tensor;
    at::ScalarType expected;
  };

  Guards(const pybind11::iterable& items, const pybind11::iterable& sizes, const pybind11::iterable& types,
         const std::vector<at::Tensor>& tensors);
  bool holds() const;

 private:
  std::vector<Item> items_;
  std::vector<Size> sizes_;
  std::vector<Type> types_;
  std::vector<Dtype> dtypes_;
};

// A bit mask of the kinds of hooks that a parameter has or had.
int hooks(const at::Tensor& parameter);

// Throws if torch's global state requires something that a step does not support (table in docs/train-step.md).
void check_global_state(const at::Tensor& input, const at::Tensor& target, at::TensorList parameters);

void bind_guards(pybind11::module_& m);  // the class mlp_ext._C.Guards

}  // namespace mlp_ext
