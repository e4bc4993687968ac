#include "cuda/kernels/pointwise.cuh"

#include "run.h"

using namespace mlp_ext;
using namespace mlp_ext::cuda;

// y = act(z + bias), in place without z
extern "C" const char* bias_act_on_cpu(const Problem* p) {
  return with_types(*p, [&](auto s, auto act) {
    using S = decltype(s);
    using Act = decltype(act);
    const Rows<const S> z = rows<const S>(p->z.data ? p->z : p->y);
    const BiasAct<S> f{p->M, p->N, z, pointer<const S>(p->bias), rows<S>(p->y)};
    const auto kernel = bias_act_vector(f) == 1 ? bias_act<S, Act, 1> : bias_act<S, Act, kVector<S>>;
    return launch(*p, bias_act_launch(f, device(*p)), [=] { kernel(f, act); });
  });
}

extern "C" const char* grad_z_on_cpu(const Problem* p) {
  return with_types(*p, [&](auto s, auto act) {
    using S = decltype(s);
    using T = Accumulator<S>;
    using Act = decltype(act);
    GradZProblem<S> g{p->M, p->N, rows<const S>(p->dy), rows<const S>(p->saved), rows<S>(p->dz), pointer<S>(p->db)};
    const Launch geometry = grad_z_launch(g, device(*p));
    std::vector<T> sums(geometry.blocks_y * p->N, T(NAN));
    std::vector<unsigned> finished(geometry.blocks_x);
    g.sums = Pointer<T>(sums.data(), sums.size());
    g.finished = Pointer<unsigned>(finished.data(), finished.size());
    const auto kernel = grad_z_vector(g) == 1 ? grad_z<S, Act, 1> : grad_z<S, Act, kVector<S>>;
    return launch(*p, geometry, [=] { kernel(g, act); });
  });
}

// dy and, as db, the loss of y and the target x with loss_weight w; K is the index of the loss
extern "C" const char* element_loss_on_cpu(const Problem* p) {
  return with_types(*p, [&](auto s, auto) {
    using S = decltype(s);
    using T = Accumulator<S>;
    ElementLoss<S> f{choose(Losses{}, p->K, p->parameters),
                     p->M,
                     p->N,
                     rows<const S>(p->y),
                     rows<const S>(p->x),
                     pointer<const S>(p->w),
                     rows<S>(p->dy),
                     T(1.0 / (p->M * p->N)),
                     pointer<S>(p->db)};
    const Launch geometry = element_loss_launch(f, device(*p));
    std::vector<T> sums(geometry.blocks(), T(NAN));
    std::vector<unsigned> finished(1);
    f.sums = Pointer<T>(sums.data(), sums.size());
    f.finished = Pointer<unsigned>(finished.data(), 1);
    const auto kernel = element_loss_vector(f) == 1 ? element_loss<S, 1> : element_loss<S, kVector<S>>;
    return launch(*p, geometry, [=] { kernel(f); });
  });
}
