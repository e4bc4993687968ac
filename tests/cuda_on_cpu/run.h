// The kernels' entries for the tests: C functions over plain buffers, which return nullptr or what went wrong.
#pragma once

#include "cuda/kernels/problem.cuh"
#include "cuda/plan.h"
#include "math/activations.h"

struct Buffer {
  void* data;        // nullptr: absent
  int64_t elements;  // from data on
  int64_t stride;    // of a matrix
};
struct Problem {
  int32_t dtype, activation;  // float32, float64, bfloat16, float16; its index in Activations
  double parameters[mlp_ext::Activations::max_parameters];  // of the activation
  int64_t M, K, N;
  Buffer x, w, bias, y, z, dy, saved, dx, dw, db, dz;
  int64_t processors, shared;  // of the device
  int32_t order, seed;         // of threads; of everything shuffled
};

namespace mlp_ext::cuda {

template <class S>
Pointer<S> pointer(const Buffer& b) {
  return b.data ? Pointer<S>(static_cast<S*>(b.data), b.elements) : Pointer<S>();
}
template <class S>
Rows<S> rows(const Buffer& b) {
  return {pointer<S>(b), b.stride};
}
inline Activation activation_of(const Problem& p) { return choose(Activations{}, p.activation, p.parameters); }
inline Device device(const Problem& p) { return {.processors = static_cast<int>(p.processors), .shared = p.shared}; }

template <class S>
Forward<S> forward_of(const Problem& p) {
  return {p.M, p.K, p.N, rows<const S>(p.x), rows<const S>(p.w), pointer<const S>(p.bias), rows<S>(p.y), rows<S>(p.z)};
}
template <class S>
Backward<S> backward_of(const Problem& p) {
  return {p.M,
          p.K,
          p.N,
          rows<const S>(p.dy),
          rows<const S>(p.saved),
          rows<const S>(p.x),
          rows<const S>(p.w),
          rows<S>(p.dx),
          pointer<S>(p.dw),
          pointer<S>(p.db)};
}

inline std::string launch(const Problem& p, const Launch& launch, const std::function<void()>& kernel) {
  return launch.blocks() ? model::run(launch, static_cast<model::Order>(p.order), p.seed, kernel) : std::string();
}

// f(S(), act) returns "" or a fault; act is one of TunedActivations, or AnyActivation.
template <class F>
const char* with_types(const Problem& p, const F& f) {
  static std::string fault;
#if defined(MUTANT)  // compiled often, so for one dtype and activation
  fault = f(float(), Sigmoid());
#else
  const auto with = [&](auto act) -> std::string {
    switch (p.dtype) {
      case 0:
        return f(float(), act);
      case 1:
        return f(double(), act);
      case 2:
        return f(BFloat16(), act);
      default:
        return f(Half(), act);
    }
  };
  const Activation activation = activation_of(p);
  fault = visit(activation, [&](auto act) -> std::string {
    if constexpr (is_tuned(decltype(act)::name))
      return with(act);
    else
      return with(AnyActivation{activation});
  });
#endif
  return fault.empty() ? nullptr : fault.c_str();
}

}  // namespace mlp_ext::cuda
