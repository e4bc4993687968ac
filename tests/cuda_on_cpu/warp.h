// CUDA's operations of a warp, in the model.
#pragma once

#include "model.h"

namespace mlp_ext::cuda::model {

// The value that the lane of number source(lane, first lane of its group, last) brought; its own beyond its group.
template <class T, class F>
T shuffle(const char* operation, unsigned mask, T value, int width, const F& source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (width < 1 || width > kWarp || (width & (width - 1)) != 0) fault("a width of " + std::to_string(width));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const Lanes<uint64_t>& brought = meet(operation, mask, bits);
  const int lane = threadIdx.x % kWarp, first = lane / width * width;
  const int from = source(lane, first, first + width - 1);
  if (!(mask >> from & 1)) fault(std::string(operation) + " from a lane outside of its mask");
  std::memcpy(&value, &brought[from], sizeof value);
  return value;
}

inline unsigned ballot(const char* operation, unsigned mask, bool vote) {
  const Lanes<uint64_t>& votes = meet(operation, mask, vote);
  unsigned bits = 0;
  for (int l = 0; l < kWarp; ++l)
    if (mask >> l & 1) bits |= static_cast<unsigned>(votes[l]) << l;
  return bits;
}

}  // namespace mlp_ext::cuda::model

inline void __syncwarp(unsigned mask = ~0u) {
  using namespace mlp_ext::cuda::model;
  meet(kSyncWarp, mask, 0);
}
inline unsigned __ballot_sync(unsigned mask, bool vote) { return mlp_ext::cuda::model::ballot(__func__, mask, vote); }
inline bool __any_sync(unsigned mask, bool vote) { return mlp_ext::cuda::model::ballot(__func__, mask, vote) != 0; }
inline bool __all_sync(unsigned mask, bool vote) { return mlp_ext::cuda::model::ballot(__func__, mask, vote) == mask; }

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = mlp_ext::cuda::model::kWarp) {
  return mlp_ext::cuda::model::shuffle(__func__, mask, value, width,
                                       [&](int, int first, int last) { return first + (from & (last - first)); });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = mlp_ext::cuda::model::kWarp) {
  return mlp_ext::cuda::model::shuffle(__func__, mask, value, width, [&](int lane, int first, int) {
    return lane - int(lanes) < first ? lane : lane - int(lanes);
  });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = mlp_ext::cuda::model::kWarp) {
  return mlp_ext::cuda::model::shuffle(__func__, mask, value, width, [&](int lane, int, int last) {
    return lane + int(lanes) > last ? lane : lane + int(lanes);
  });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = mlp_ext::cuda::model::kWarp) {
  return mlp_ext::cuda::model::shuffle(__func__, mask, value, width, [&](int lane, int, int last) {
    return (lane ^ lanes) > last ? lane : lane ^ lanes;
  });
}
