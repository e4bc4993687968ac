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
void barrier_of_each_half() {
  if (threadIdx.x < kThreads / 2)
    __syncthreads();
  else
    __syncthreads();
}

// y = x reversed, by the last block, from what all blocks wrote there.
template <bool barrier, bool release, bool acquire>
void reversed_by_last(int64_t n, Pointer<const float> x, Pointer<float> y, Pointer<unsigned> finished) {
  const int t = threadIdx.x;
  const int64_t i = blockIdx.x * int64_t{kThreads} + t;
  if (i < n) y[i] = x[i];
  if (barrier) __syncthreads();
  bool last = false;
  if (t == 0) {
    if (release) __threadfence();
    last = atomicInc(finished, gridDim.x - 1) == gridDim.x - 1;
    if (acquire) __threadfence();
  }
  if (!__syncthreads_or(last)) return;
  for (int64_t j = t; j < n / 2; j += kThreads) {
    const float left = y[j];
    y[j] = float(y[n - 1 - j]);
    y[n - 1 - j] = left;
  }
}

}  // namespace

// dtype: which of the kernels.
extern "C" const char* faulty_on_cpu(const Problem* p) {
  static std::string fault;
  const int64_t n = p->M;
  const auto x = pointer<const float>(p->x);
  const auto y = pointer<float>(p->y);
  std::vector<unsigned> counter(1);
  const Pointer<unsigned> finished(counter.data(), 1);
  const Launch whole{ceil_div(n, kThreads), 1, kThreads, shared_bytes<float>(kThreads)};
  const Launch less{whole.blocks_x, 1, kThreads, whole.shared - 16};
  const std::function<void()> kernels[] = {
      [=] { reversed<true, 0>(n, x, y); },                                // 0: without a fault
      [=] { reversed<false, 0>(n, x, y); },                               // 1: a removed barrier
      [=] { reversed<true, 1>(n, x, y); },                                // 2: one element too far
      [=] { barrier_of_some(n); },                                        // 3: a barrier that some threads miss
      [=] { store(y, load<4>(x + 1)); },                                  // 4: 16 bytes from where they are not aligned
      [=] { reversed<true, 0>(n, x, y); },                                // 5: less shared memory than is used
      [=] { barrier_of_each_half(); },                                    // 6: barriers in two branches
      [=] { reversed_by_last<true, true, true>(n, x, y, finished); },     // 7: the last block, without a fault
      [=] { reversed_by_last<false, true, true>(n, x, y, finished); },    // 8: without its barrier
      [=] { reversed_by_last<true, false, true>(n, x, y, finished); },    // 9: without the fence before the atomic
      [=] { reversed_by_last<true, true, false>(n, x, y, finished); },    // 10: without that after it
      [] { SharedMemory().take<float>(kThreads)[threadIdx.x / 2] = 0; },  // 11: two threads write one element
  };
  fault = launch(*p, p->dtype == 5 ? less : whole, kernels[p->dtype]);
  return fault.empty() ? nullptr : fault.c_str();
}
