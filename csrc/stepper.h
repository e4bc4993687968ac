// The class mlp_ext._C.Stepper.
#pragma once

#include <pybind11/pybind11.h>

namespace mlp_ext {
void bind_stepper(pybind11::module_& m);
}  // namespace mlp_ext
