// y[i] = f(lane, x[i]) by operations of a warp: right ones, and ones with a fault that the model must see.
#include <map>

#include "run.h"

using namespace mlp_ext::cuda;

namespace {

constexpr int kThreads = 64, kWarp = model::kWarp;
constexpr unsigned kAll = ~0u;

float sum_by_xor(int, float v) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) v += __shfl_xor_sync(kAll, v, lanes);
  return v;
}
float sum_of_8_in_their_first(int lane, float v) {
  double sum = v;
  for (int lanes = 4; lanes > 0; lanes /= 2) sum += __shfl_down_sync(kAll, sum, lanes, 8);
  return lane % 8 == 0 ? static_cast<float>(sum) : 0;
}
float running_sum(int lane, float v) {
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const float below = __shfl_up_sync(kAll, v, lanes);
    if (lane >= lanes) v += below;
  }
  return v;
}
float third_of_16(int, float v) { return __shfl_sync(kAll, v, 16 + 3, 16); }
float one_up_of_4(int, float v) { return __shfl_up_sync(kAll, v, 1, 4); }
float across_groups_of_8(int, float v) { return __shfl_xor_sync(kAll, v, 8, 8); }
float count_of_thirds(int, float v) {
  const bool third = static_cast<int>(v) % 3 == 0;
  const auto votes = static_cast<float>(std::popcount(__ballot_sync(kAll, third)));
  return votes + 100 * __any_sync(kAll, v == 40) + 200 * __all_sync(kAll, v < 64);
}
float sum_of_halves(int lane, float v) {  // in two branches, each with its mask
  const unsigned mask = lane < 16 ? 0xffffu : 0xffff0000u;
  if (lane < 16)
    for (int lanes = 8; lanes > 0; lanes /= 2) v += __shfl_xor_sync(mask, v, lanes);
  else
    for (int lanes = 8; lanes > 0; lanes /= 2) v += __shfl_xor_sync(mask, v, lanes);
  return v;
}

// The value of the opposite lane, through shared memory, twice.
template <bool after_write, bool after_read, unsigned mask = kAll>
float opposite(int lane, float v) {
  SharedMemory shared;
  const auto values = shared.take<float>(kThreads) + (threadIdx.x - lane);
  for (int turn = 0; turn < 2; ++turn) {
    values[lane] = v + static_cast<float>(turn);
    if (after_write) __syncwarp(mask);
    v = values[kWarp - 1 - lane];
    if (after_read) __syncwarp();
  }
  return v;
}
float opposite_after_a_shuffle(int lane, float v) {
  SharedMemory shared;
  const auto values = shared.take<float>(kThreads) + (threadIdx.x - lane);
  values[lane] = v;
  __shfl_sync(kAll, v, 0);
  return values[kWarp - 1 - lane];
}
// Each half of the warp orders itself, and then reads of the other.
float opposite_of_halves(int lane, float v) {
  SharedMemory shared;
  const auto values = shared.take<float>(kThreads) + (threadIdx.x - lane);
  values[lane] = v;
  __syncwarp(lane < 16 ? 0xffffu : 0xffff0000u);
  return values[kWarp - 1 - lane];
}
// All read one element, and then one lane writes it.
template <bool sync>
float first_then_change(int lane, float v) {
  SharedMemory shared;
  const auto first = shared.take<float>(kThreads) + (threadIdx.x - lane);
  if (lane == 0) first[0] = v;
  __syncwarp();
  v = first[0];
  if (sync) __syncwarp();
  if (lane == 5) first[0] = 0;
  return v;
}

float in_a_branch(int lane, float v) { return lane < 16 ? __shfl_xor_sync(kAll, v, 1) : v; }
float of_two_kinds(int lane, float v) { return lane < 16 ? __any_sync(kAll, v > 0) : __all_sync(kAll, v > 0); }
float of_two_masks(int lane, float v) { return __shfl_xor_sync(lane < 16 ? kAll : 0xffff0000u, v, 1); }
float from_outside(int lane, float v) { return lane < 16 ? __shfl_xor_sync(0xffffu, v, 16) : v; }
float not_its_own(int lane, float v) { return lane < 17 ? __shfl_xor_sync(0xffffu, v, 1) : v; }
float of_width_12(int, float v) { return __shfl_down_sync(kAll, v, 1, 12); }
float past_a_barrier(int lane, float v) {
  if (lane == 0)
    __syncthreads();
  else
    __syncwarp();
  return v;
}

}  // namespace

extern "C" const char* warps_on_cpu(const Problem* p, const char* name) {
  static std::string fault;
  const std::map<std::string, float (*)(int, float)> kernels{
      {"sum by xor", sum_by_xor},
      {"sum of 8 in their first", sum_of_8_in_their_first},
      {"running sum", running_sum},
      {"third of 16", third_of_16},
      {"one up of 4", one_up_of_4},
      {"across groups of 8", across_groups_of_8},
      {"count of thirds", count_of_thirds},
      {"sum of halves", sum_of_halves},
      {"opposite", opposite<true, true>},
      {"first then change", first_then_change<true>},
      {"opposite without sync after write", opposite<false, true>},
      {"opposite without sync after read", opposite<true, false>},
      {"opposite after a shuffle", opposite_after_a_shuffle},
      {"opposite of halves", opposite_of_halves},
      {"first then change without sync", first_then_change<false>},
      {"in a branch", in_a_branch},
      {"of two kinds", of_two_kinds},
      {"of two masks", of_two_masks},
      {"from outside", from_outside},
      {"not its own", not_its_own},
      {"of width 12", of_width_12},
      {"past a barrier", past_a_barrier},
  };
  const auto kernel = kernels.at(name);
  const Launch geometry{ceil_div(p->M, kThreads), 1, kThreads, shared_bytes<float>(kThreads)};
  fault = launch(*p, geometry, [=, n = p->M, x = pointer<const float>(p->x), y = pointer<float>(p->y)] {
    const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
    const float result = kernel(threadIdx.x % kWarp, i < n ? float(x[i]) : 0.f);
    if (i < n) y[i] = result;
  });
  return fault.empty() ? nullptr : fault.c_str();
}
