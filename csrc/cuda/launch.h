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

struct Gpu : Device {  // where to launch
  cudaStream_t stream;
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

// Training steps of networks with the same layers. Batch i of an epoch uses rows
// order[i * batch : (i + 1) * batch]; the last batch may be smaller.
struct StepLayerProblem {
  int64_t K, N;
  Activation activation;
  bool has_bias, weight_learns, bias_learns;
};
struct StepsProblem {
  DType dtype;
  int64_t epochs, batch;
  int64_t batches;     // in an epoch, of the network with most rows
  int64_t input_rows;  // of each network's input
  LossFunction loss;
  bool mean;
  int64_t classes_stride, ignore_index;
  const void* loss_weight;  // [N] or nullptr
  int64_t layers, lowest_learning;
  StepLayerProblem layer[kStepLayers];
};
struct StepParameterProblem {     // contiguous
  void* value = nullptr;          // nullptr: there is none
  Optimizer optimizer = {};       // if it learns
  void* states[kMaxStates] = {};  // nullptr where the optimizer does not have that state
  double count = 0;               // of the steps before; on the GPU in one of:
  const float* float_count = nullptr;
  const double* double_count = nullptr;
};
struct StepNetworkProblem {
  int64_t rows;            // of an epoch
  const int64_t* order;    // [epochs, rows], indices among the rows of x; nullptr: rows in their own order
  ConstMatrix x;           // [input_rows, K]
  ConstMatrix target;      // [input_rows, N]; unread with classes
  const int64_t* classes;  // [input_rows] or nullptr
  void* losses;            // [epochs, batches]
  StepParameterProblem parameters[2 * kStepLayers];  // of each layer its weight [N, K] and its bias [N]
};

// Whole problems. A workspace has as many bytes as the function above says, of any content.
cudaError_t launch_small_forward(const ForwardProblem& problem, const Gpu& gpu);
cudaError_t launch_small_backward(const BackwardProblem& problem, const Gpu& gpu);

cudaError_t launch_tall_forward(const ForwardProblem& problem, const Gpu& gpu);
int64_t tall_backward_bytes(const BackwardProblem& problem, const Gpu& gpu);
cudaError_t launch_tall_backward(const BackwardProblem& problem, void* workspace, const Gpu& gpu);

cudaError_t launch_train_steps(const StepsProblem& problem, const StepNetworkProblem& network, const Gpu& gpu);
// Many networks, each in a block of its own: a table of them is filled on the host and read on the GPU.
int64_t network_table_bytes(const StepsProblem& problem, int64_t networks);
void put_network(const StepsProblem& problem, int64_t networks, int64_t index, const StepNetworkProblem& network,
                 void* table);
cudaError_t launch_train_networks(const StepsProblem& problem, int64_t networks, const void* table, const Gpu& gpu);

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
