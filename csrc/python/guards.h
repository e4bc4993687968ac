// Whether Python objects are still made of the parts that they were made of when they were read. In C++ since it is
// asked at every call.
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

void bind_guards(pybind11::module_& m);  // the classes Guards and Run of mlp_ext._C

}  // namespace mlp_ext
