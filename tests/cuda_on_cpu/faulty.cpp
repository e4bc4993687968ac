// Kernels with a fault each, which the model must see; and the same without it.
#include <map>

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
template <bool barrier, bool release, bool acquire, bool each = false>
void reversed_by_last(int64_t n, Pointer<const float> x, Pointer<float> y, Pointer<unsigned> finished) {
  const int t = threadIdx.x;
  const int64_t i = blockIdx.x * int64_t{kThreads} + t;
  if (i < n) y[i] = x[i];
  if (each) __threadfence();
  if (barrier) __syncthreads();
  bool last = false;
  if (t == 0) {
    if (release) __threadfence();
    last = atomicInc(finished, gridDim.x - 1) == gridDim.x - 1;
    if (acquire) __threadfence();
  }
  if (!__syncthreads_or(last)) return;
  if (each) __threadfence();
  for (int64_t j = t; j < n / 2; j += kThreads) {
    const float left = y[j];
    y[j] = float(y[n - 1 - j]);
    y[n - 1 - j] = left;
  }
}

}  // namespace

extern "C" const char* faulty_on_cpu(const Problem* p, const char* name) {
  static std::string fault;
  const int64_t n = p->M;
  const auto x = pointer<const float>(p->x);
  const auto y = pointer<float>(p->y);
  std::vector<unsigned> counter(1);
  const Pointer<unsigned> finished(counter.data(), 1);
  Launch geometry{ceil_div(n, kThreads), 1, kThreads, shared_bytes<float>(kThreads)};
  const std::map<std::string, std::function<void()>> kernels{
      {"reversed", [=] { reversed<true, 0>(n, x, y); }},
      {"reversed without its barrier", [=] { reversed<false, 0>(n, x, y); }},
      {"reversed beyond the end", [=] { reversed<true, 1>(n, x, y); }},
      {"reversed with less shared memory", [=] { reversed<true, 0>(n, x, y); }},
      {"a barrier that some miss", [=] { barrier_of_some(n); }},
      {"barriers in two branches", [=] { barrier_of_each_half(); }},
      {"16 bytes from an odd element", [=] { store(y, load<4>(x + 1)); }},
      {"two threads write one element", [] { SharedMemory().take<float>(kThreads)[threadIdx.x / 2] = 0; }},
      {"last block", [=] { reversed_by_last<true, true, true>(n, x, y, finished); }},
      {"last block with a fence of each thread",
       [=] { reversed_by_last<true, false, false, true>(n, x, y, finished); }},
      {"last block without its barrier", [=] { reversed_by_last<false, true, true>(n, x, y, finished); }},
      {"last block without the fence before", [=] { reversed_by_last<true, false, true>(n, x, y, finished); }},
      {"last block without the fence after", [=] { reversed_by_last<true, true, false>(n, x, y, finished); }},
  };
  if (name == std::string("reversed with less shared memory")) geometry.shared -= 16;
  fault = launch(*p, geometry, kernels.at(name));
  return fault.empty() ? nullptr : fault.c_str();
}
