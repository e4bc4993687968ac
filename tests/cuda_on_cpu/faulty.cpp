// Kernels with a fault each, which the model must see; and the same without it.
#include "run.h"

using namespace mlp_ext::cuda;

namespace {

constexpr int kThreads = 64;

// y = x reversed in pieces of a block, through shared memory.
template <bool barrier, int beyond>
void reversed(int64_t n, Pointer<const float> x, Pointer<float> y) {
  SharedMemory shared;
  const auto tile = shared.take<float>(kThreads);
  const int t = threadIdx.x;
  const int64_t begin = blockIdx.x * int64_t{kThreads}, size = smaller(kThreads, n - begin);
  if (t < size + beyond) tile[t] = x[begin + t];
  if (barrier) __syncthreads();
  if (t < size) y[begin + t] = tile[size - 1 - t];
}

void barrier_of_some(int64_t n) {
  if (threadIdx.x < n % kThreads) __syncthreads();
}

}  // namespace

// dtype 0: without a fault; 1: a removed barrier; 2: one element too far; 3: a barrier that some threads miss;
// 4: 16 bytes at a time from where they are not aligned; 5: less shared memory than is used.
extern "C" const char* faulty_on_cpu(const Problem* p) {
  static std::string fault;
  const int64_t n = p->M;
  const auto x = pointer<const float>(p->x);
  const auto y = pointer<float>(p->y);
  const Launch whole{ceil_div(n, kThreads), 1, kThreads, shared_bytes<float>(kThreads)};
  const Launch less{whole.blocks_x, 1, kThreads, whole.shared - 16};
  const std::function<void()> kernels[] = {
      [=] { reversed<true, 0>(n, x, y); }, [=] { reversed<false, 0>(n, x, y); }, [=] { reversed<true, 1>(n, x, y); },
      [=] { barrier_of_some(n); },         [=] { store(y, load<4>(x + 1)); },    [=] { reversed<true, 0>(n, x, y); },
  };
  fault = launch(*p, p->dtype == 5 ? less : whole, kernels[p->dtype]);
  return fault.empty() ? nullptr : fault.c_str();
}
