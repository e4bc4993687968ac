#include "cuda/kernels/step.cuh"

#include "run.h"

using namespace mlp_ext::cuda;

namespace {

struct ParameterBuffers {
  Buffer value, momentum_buffer;
  double hyperparameters[mlp_ext::Sgd::size];
  int64_t learns;
};
struct LayerBuffers {
  int64_t K, N, activation;
  ParameterBuffers weight, bias;
};
struct StepsBuffers {
  int64_t dtype, rows, batch, input_rows, loss, mean, ignore_index, layers, lowest_learning;
  double label_smoothing;
  Buffer order, x, target, classes, loss_weight, losses;
  const LayerBuffers* layer;
  int64_t order_of_threads;
};

template <class S>
StepParameter<S> parameter(const ParameterBuffers& p) {
  const double* const h = p.hyperparameters;
  return {pointer<S>(p.value),
          pointer<S>(p.momentum_buffer),
          {h[0], h[1], h[2], h[3], h[4] != 0, h[5] != 0},
          p.learns != 0};
}

template <class S>
std::string run(const StepsBuffers& p) {
  Steps<S> f{p.rows,
             p.batch,
             pointer<const int64_t>(p.order),
             p.input_rows,
             rows<const S>(p.x),
             {static_cast<int>(p.loss), p.mean != 0, rows<const S>(p.target), pointer<const int64_t>(p.classes),
              p.classes.stride, pointer<const S>(p.loss_weight), p.ignore_index, p.label_smoothing},
             pointer<S>(p.losses),
             static_cast<int>(p.layers),
             static_cast<int>(p.lowest_learning)};
  int64_t widths[kStepLayers + 1] = {p.layer[0].K};
  for (int l = 0; l < p.layers; ++l) {
    const LayerBuffers& from = p.layer[l];
    f.layer[l] = {static_cast<int>(from.K), static_cast<int>(from.N), static_cast<int>(from.activation),
                  parameter<S>(from.weight), parameter<S>(from.bias)};
    widths[l + 1] = from.N;
  }
  const Launch geometry = steps_launch(f);
  constexpr auto dtype = sizeof(S) == 8 ? mlp_ext::DType::float64 : mlp_ext::DType::float32;
  if (geometry.shared > step_shared_bytes({widths, p.layers, p.batch, dtype, 90, 0}))
    return "more shared memory than planned";
  return model::run(geometry, static_cast<model::Order>(p.order_of_threads), 0, [=] { sgd_steps<S>(f); });
}

std::string run(const StepsBuffers& p) {
#if defined(MUTANT)
  return run<float>(p);
#else
  return p.dtype == 0 ? run<float>(p) : p.dtype == 1 ? run<double>(p) : p.dtype == 2 ? run<BFloat16>(p) : run<Half>(p);
#endif
}

}  // namespace

extern "C" const char* sgd_steps_on_cpu(const StepsBuffers* p) {
  static std::string fault;
  fault = run(*p);
  return fault.empty() ? nullptr : fault.c_str();
}

// For the sanitizers, a K-N-K network in the arrays that the other kernels take.
extern "C" const char* sgd_step_on_cpu(const Problem* p) {
  const ParameterBuffers none{};
  const LayerBuffers layers[] = {{p->K, p->N, p->activation, {p->w, {}, {0.1}, 1}, {p->bias, p->db, {0.1, 0.9}, 1}},
                                 {p->N, p->K, 0, {p->dw, {}, {0.1}, 1}, none}};
  const StepsBuffers steps{p->dtype, p->M, (p->M + 1) / 2, p->M,  0,  1,  0,    2,      0,
                           0,        {},   p->x,           p->dx, {}, {}, p->y, layers, p->order};
  return sgd_steps_on_cpu(&steps);
}
