#include "cuda/kernels/tall.cuh"

#include "run.h"

using namespace mlp_ext::cuda;

extern "C" const char* tall_forward_on_cpu(const Problem* p) {
  return with_types(*p, [&](auto s, auto act) {
    const auto f = forward_of<decltype(s)>(*p);
    return launch(*p, tall_forward_launch(f, device(*p)), [=] { tall_forward<decltype(s), decltype(act)>(f, act); });
  });
}

extern "C" const char* tall_backward_on_cpu(const Problem* p) {
  return with_types(*p, [&](auto s, auto act) {
    using S = decltype(s);
    using T = Accumulator<S>;
    const auto b = backward_of<S>(*p);
    const Launch blocks = tall_backward_launch(b, device(*p));
    std::vector<T> workspace(blocks.blocks() * tall_backward_part(b), T(NAN));
    const Pointer<T> parts(workspace.data(), workspace.size());
    const std::string fault = launch(*p, blocks, [=] { tall_backward<S, decltype(act)>(b, act, parts); });
    if (!fault.empty()) return fault;
    const Pointer<const T> sums = parts;
    return launch(*p, sum_parts_launch(b), [=] { sum_parts<S>(sums, blocks.blocks(), b); });
  });
}
