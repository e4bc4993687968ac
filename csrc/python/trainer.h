// The class mlp_ext._C.Trainer.
#pragma once

#include <pybind11/pybind11.h>

namespace mlp_ext {
void bind_trainer(pybind11::module_& m);
}  // namespace mlp_ext
