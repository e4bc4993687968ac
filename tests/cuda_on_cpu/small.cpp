#include "cuda/kernels/small.cuh"

#include "run.h"

using namespace mlp_ext::cuda;

extern "C" const char* small_forward_on_cpu(const Problem* p) {
  return with_types(*p, [&](auto s, auto act) {
    const auto f = forward_of<decltype(s)>(*p);
    return launch(*p, small_forward_launch(f), [=] { small_forward<decltype(s), decltype(act)>(f, act); });
  });
}

extern "C" const char* small_backward_on_cpu(const Problem* p) {
  return with_types(*p, [&](auto s, auto act) {
    const auto b = backward_of<decltype(s)>(*p);
    return launch(*p, small_backward_launch(b), [=] { small_backward<decltype(s), decltype(act)>(b, act); });
  });
}
