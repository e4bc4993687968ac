// The kernels as the backend sees them: plain pointers in, work for a stream out. No torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "cuda/plan.h"
#include "math/activations.h"
#include "math/losses.h"
#include "math/matrix.h"
#include "math/optimizers.h"

namespace mlp_ext::cuda {

struct Gpu {  // where to launch
  cudaStream_t stream;
  int processors;  // multiprocessors
  int64_t shared;  // bytes of shared memory of each
};

// y = act(x W^T + b)
struct ForwardProblem {
  DType dtype;
  Activation activation;
  int64_t M, K, N;
  ConstMatrix x;     // [M, K]
  ConstMatrix w;     // [N, K]
  const void* bias;  // [N] or nullptr
  Matrix y;          // [M, N]
  Matrix z;          // [M, N] or nullptr: x W^T + b, for an activation whose backward needs it
};

// dz = act'(dy, saved);  dx = dz W;  dW = dz^T x;  db = sum over rows of dz
struct BackwardProblem {
  DType dtype;
  Activation activation;
  int64_t M, K, N;
  ConstMatrix dy, saved;  // [M, N]; saved is what the activation needs: y, z, or nullptr for nothing
  ConstMatrix x;          // [M, K], for dW
  ConstMatrix w;          // [N, K], for dx
  Matrix dx;              // [M, K] or nullptr
  void* dw;               // [N, K] or nullptr, contiguous
  void* db;               // [N] or nullptr
};

// dy = L'(y, t) scale;  loss = scale times the sum of L(y, t)
struct LossProblem {
  DType dtype;
  LossFunction loss;  // of elements
  int64_t M, N;
  ConstMatrix y, target;  // [M, N], not empty
  const void* weight;     // [N] or nullptr
  Matrix dy;
  double scale;
  void* value;  // []
};

// Training steps: batch i has the rows of order from i batch on, the last one maybe fewer.
struct StepParameterProblem {  // contiguous
  void* value = nullptr;       // nullptr: there is none
  bool learns = false;
  Optimizer optimizer = {};
  void* states[kMaxStates] = {};  // nullptr where the optimizer does not have that state
  double count = 0;               // of the steps before; on the GPU in one of:
  const float* float_count = nullptr;
  const double* double_count = nullptr;
};
struct StepLayerProblem {
  int64_t K, N;
  Activation activation;
  StepParameterProblem weight, bias;  // [N, K], [N]
};
struct StepsProblem {
  DType dtype;
  int64_t rows, batch;
  const int64_t* order;  // [rows], indices among the rows of x; nullptr: as they lie
  int64_t input_rows;
  ConstMatrix x;  // [input_rows, K]
  LossFunction loss;
  bool mean;
  ConstMatrix target;      // [input_rows, N]; unread with classes
  const int64_t* classes;  // [input_rows] or nullptr
  int64_t classes_stride, ignore_index;
  const void* loss_weight;  // [N] or nullptr
  void* losses;             // [steps]
  int64_t layers, lowest_learning;
  StepLayerProblem layer[kStepLayers];
};

// Whole problems. A workspace has as many bytes as the function above says, of any content.
cudaError_t launch_small_forward(const ForwardProblem& problem, const Gpu& gpu);
cudaError_t launch_small_backward(const BackwardProblem& problem, const Gpu& gpu);

cudaError_t launch_tall_forward(const ForwardProblem& problem, const Gpu& gpu);
int64_t tall_backward_bytes(const BackwardProblem& problem, const Gpu& gpu);
cudaError_t launch_tall_backward(const BackwardProblem& problem, void* workspace, const Gpu& gpu);

cudaError_t launch_train_steps(const StepsProblem& problem, const Gpu& gpu);

// On the tensor cores of compute capability 9.0, bfloat16 or float16. All rows are whole multiples of 16 bytes and
// begin at such.
cudaError_t launch_sm90_forward(const ForwardProblem& problem, const Gpu& gpu);

// The passes around a library's GEMMs: y = act(z), in place without z;  dz [M, N] and db, each may be nullptr.
cudaError_t launch_act(const ForwardProblem& problem, const Gpu& gpu);
int64_t grad_z_bytes(const BackwardProblem& problem, const Gpu& gpu);
cudaError_t launch_grad_z(const BackwardProblem& problem, void* dz, void* workspace, const Gpu& gpu);

int64_t element_loss_bytes(const LossProblem& problem, const Gpu& gpu);
cudaError_t launch_element_loss(const LossProblem& problem, void* workspace, const Gpu& gpu);

}  // namespace mlp_ext::cuda
