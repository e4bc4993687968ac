// The class mlp_ext._C.MlpCall.
#pragma once

#include <pybind11/pybind11.h>

namespace mlp_ext {
void bind_mlp_call(pybind11::module_& m);
}  // namespace mlp_ext
