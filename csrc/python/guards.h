// What a step depends on beside its arguments: Python objects, which may have changed since they were read, and torch's
// global state. In C++ since it is checked at every call.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <vector>

namespace mlp_ext {

class Guards {
 public:
  struct Item {  // of a dict or list, the very object expected at the key
    pybind11::object container, key, expected;
  };
  struct Size {  // of a dict or list
    pybind11::object container;
    int64_t expected;
  };
  struct Type {  // an object's own
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

// The kinds of hooks that a parameter has, or had.
int hooks(const at::Tensor& parameter);

// Throws where torch's global state asks for what a step does not do. docs/train-step.md has the whole table.
void check_global_state(const at::Tensor& input, const at::Tensor& target, at::TensorList parameters);

void bind_guards(pybind11::module_& m);  // the class mlp_ext._C.Guards

}  // namespace mlp_ext
