// Training steps on the CPU: the backend of mlp_train_step_.
#pragma once

#include "ops/train.h"

namespace mlp_ext::cpu {

at::Tensor train(const Training& training);

}  // namespace mlp_ext::cpu
