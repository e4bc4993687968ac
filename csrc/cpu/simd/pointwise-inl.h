// Elementwise kernels for the functors of math/*.h: activations, losses, updates. Compiled once per instruction set;
// other kernels call them through tables, with a tile or a few rows in L1.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/epilogue-inl.h"
#include "cpu/simd/pack-inl.h"
#include "cpu/simd/per_lane-inl.h"
#include "cpu/simd/row_sums-inl.h"
#include "cpu/simd/vec-inl.h"
#include "math/activations.h"
#include "math/losses.h"
#include "math/optimizers.h"

namespace mlp_ext::cpu {
namespace {

// ---- activations ----

template <class S, class Act>
__attribute__((flatten)) void act(const Activation& activation, ConstMatrix z, Matrix y, int64_t rows, int64_t columns,
                                  bool past_caches) {
  using T = Accumulator<S>;
  const auto act = get<Act>(activation);
  for (int64_t m = 0; m < rows; ++m)
    for_vectors<T>(columns, [&](int64_t n, auto lanes) {
      store_result(at<S>(y, m, n), act.forward(load(at<T>(z, m, n), lanes)), lanes, past_caches);
    });
}

template <class S, class Act>
__attribute__((flatten)) void grad_z(const Activation& activation, ConstMatrix dy, ConstMatrix saved, Matrix dz,
                                     void* db_out, int64_t rows, int64_t columns) {
  using T = Accumulator<S>;
  const auto act = get<Act>(activation);
  T* const db = static_cast<T*>(db_out);
  for_rows({0, rows}, [&](auto count, int64_t m) {
    constexpr int P = decltype(count)::value;
    for_vectors<T>(columns, [&](int64_t n, auto lanes) {
      Vec<T> sum;
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const Vec<T> grad = load(at<S>(dy, m + p, n), lanes);
        const Vec<T> operand = std::is_same_v<Act, Identity> ? grad : load(at<S>(saved, m + p, n), lanes);
        const Vec<T> v = act.backward(grad, operand);
        store(at<T>(dz, m + p, n), v, lanes);
        sum = sum + v;
      }
      if (db) store(db + n, load(db + n, lanes) + sum, lanes);
    });
  });
}

// ---- losses ----

// v with 0 in the lanes past the end, whose loss is undefined.
template <class T>
Vec<T> only(Vec<T> v, AllLanes) {
  return v;
}
template <class T>
Vec<T> only(Vec<T> v, int n) {
  typename Vec<T>::Bits lane;
  for (int i = 0; i < Vec<T>::lanes; ++i) lane[i] = i;
  return where(typename Vec<T>::Mask{lane < n}, v, Vec<T>());
}

template <class T>
bool are_probabilities(Vec<T> v) {
  bool all = true;
  for (int i = 0; i < Vec<T>::lanes; ++i) all = all && v.v[i] >= 0 && v.v[i] <= 1;
  return all;
}

// Sums of losses of one network.
template <class T>
struct SumOfAll {
  bool& valid;
  double total = 0;
  void check(Vec<T> y, Vec<T> t) { valid = valid && are_probabilities(y) && are_probabilities(t); }
  void add(Vec<T> sum) {
    for (int lane = 0; lane < Vec<T>::lanes; ++lane) total += static_cast<double>(sum.v[lane]);
  }
};
// The same for a network in each lane.
template <class T>
struct SumOfEachLane {
  using V = Vec<T>;
  double* totals;
  V refused;
  void check(V y, V t) {
    for (const V v : {y, t}) refused = where(0 <= v, where(v <= 1, refused, V(1)), V(1));
  }
  void add(V sum) {
    for (int lane = 0; lane < V::lanes; ++lane) totals[lane] += static_cast<double>(sum.v[lane]);
  }
};

// Losses of single elements y with targets t and weights w (nullptr: 1).
template <class T, class LossOf, class Sums>
__attribute__((flatten)) void element_loss(const LossOf& loss, Vec<T> scale, int64_t size, const T* y, const T* t,
                                           const T* w, T* dy, Sums& sums) {
  using V = Vec<T>;
  const auto l = loss;
  constexpr int64_t piece = kShortRows * V::lanes;
  for (int64_t begin = 0; begin < size; begin += piece) {
    V sum;
    for_vectors<T>(std::min(piece, size - begin), [&](int64_t j, auto lanes) {
      const int64_t i = begin + j;
      const V yi = load(y + i, lanes), ti = load(t + i, lanes), wi = w ? load(w + i, lanes) : V(1);
      if constexpr (is_of_probabilities<LossOf>) sums.check(yi, ti);
      store(dy + i, l.backward(yi, ti, wi, scale), lanes);
      sum = sum + only(l.forward(yi, ti, wi), lanes);
    });
    sums.add(sum);
  }
}

// The Row of math/losses.h; dy holds the exponentials between sum_exp and put.
template <class S, class T = Accumulator<S>>
struct LossRow {
  const Loss& loss;
  int64_t m, N, class_of_row;
  const T* y;
  T* dy;

  int64_t c() const { return class_of_row; }
  T z(int64_t n) const { return y[n]; }
  T t(int64_t n) const { return scalar(at<S>(loss.target, m, n)); }
  T w(int64_t n) const { return loss.weight ? scalar(static_cast<const S*>(loss.weight) + n) : T(1); }
  T sum_exp(T most) const {
    T sum = 0;
    for_vectors<T>(N, [&](int64_t n, auto lanes) {
      const Vec<T> e = cpu::exp(load(y + n, lanes) - Vec<T>(most));
      store(dy + n, e, lanes);
      sum += sum_lanes(only(e, lanes));
    });
    return sum;
  }
  T exp(int64_t n, T) const { return dy[n]; }
  void put(int64_t n, T v) const { dy[n] = v; }
};

// The target's rows as contiguous T: in place, or copied to `copy`.
template <class S, class T = Accumulator<S>>
const T* contiguous(const ConstMatrix& target, Range rows, int64_t N, T* copy) {
  if constexpr (std::is_same_v<S, T>)
    if (target.stride == N) return at<S>(target, rows.begin, 0);
  for (int64_t m = rows.begin; m < rows.end; ++m)
    for_vectors<T>(N, [&](int64_t n, auto lanes) {
      store(copy + (m - rows.begin) * N + n, load(at<S>(target, m, n), lanes), lanes);
    });
  return copy;
}

// ---- losses in lanes: of a network, or a row, in each ----

// The classes of a row; see math/losses.h.
template <class T>
struct ClassOfEachLane {
  Vec<T> number;
  bool given;
  friend MLP_EXT_INLINE bool has_class(const ClassOfEachLane& c) { return c.given; }
  friend MLP_EXT_INLINE auto is_class(const ClassOfEachLane& c, int64_t n) {
    return typename Vec<T>::Mask{c.number.v == Vec<T>(static_cast<T>(n)).v};
  }
  template <class F>
  friend MLP_EXT_INLINE Vec<T> of_class(const ClassOfEachLane& c, int64_t N, const F& f) {
    Vec<T> v;
    for (int64_t n = 0; n < N; ++n) v = where(is_class(c, n), f(n), v);
    return v;
  }
};

template <class T>
struct RowOfEachLane {
  using V = Vec<T>;
  const T *y, *target, *weight;
  T* dy;
  int64_t N;
  ClassOfEachLane<T> classes;

  const ClassOfEachLane<T>& c() const { return classes; }
  V z(int64_t n) const { return load(y + n * V::lanes); }
  V t(int64_t n) const { return load(target + n * V::lanes); }
  V w(int64_t n) const { return learned(weight ? load(weight + n * V::lanes) : V(1)); }
  V sum_exp(V most) const {
    V sum;
    for (int64_t n = 0; n < N; ++n) {
      const V e = cpu::exp(z(n) - most);
      store(dy + n * V::lanes, e);
      sum = sum + e;
    }
    return sum;
  }
  V exp(int64_t n, V) const { return load(dy + n * V::lanes); }
  V learned(V v) const { return classes.given ? where(classes.number < 0, V(), v) : v; }  // 0 if ignored
  void put(int64_t n, V v) const { store(dy + n * V::lanes, v); }
};

template <class T, class LossOf>
__attribute__((flatten)) void row_losses_in_lanes(const LossOf& loss, Vec<T> scale, bool of_classes, int64_t rows,
                                                  RowOfEachLane<T> row, SumOfEachLane<T>& sums) {
  const int64_t size = row.N * Vec<T>::lanes;
  Vec<T> sum;
  for (int64_t m = 0; m < rows; ++m, row.y += size, row.dy += size) {
    row.classes = {of_classes ? load(row.target) : Vec<T>(), of_classes};
    sum = sum + row.learned(loss.template row<Vec<T>>(row, row.N, row.learned(scale)));
    row.target += of_classes ? Vec<T>::lanes : size;
  }
  sums.add(sum);
}

// Losses of rows with so few outputs that they would leave vectors empty: a row in each lane.
constexpr int64_t kFewOutputsOfLoss = 16;
template <class S, class LossOf, class T = Accumulator<S>>
double few_outputs_losses(const LossOf& l, const Loss& loss, Range rows, int64_t N, const T* y, T* dy) {
  constexpr int64_t lanes = Vec<T>::lanes;
  alignas(kVectorBytes) T z[kFewOutputsOfLoss * lanes], target[kFewOutputsOfLoss * lanes],
      weight[kFewOutputsOfLoss * lanes], dz[kFewOutputsOfLoss * lanes];
  if (loss.weight)
    for (int64_t n = 0; n < N; ++n) store(weight + n * lanes, Vec<T>(scalar(static_cast<const S*>(loss.weight) + n)));
  double total = 0;
  for (int64_t first = rows.begin; first < rows.end; first += lanes) {
    const int64_t used = std::min(lanes, rows.end - first);
    const T* from[lanes];
    T* to[lanes];
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t m = first + std::min(lane, used - 1);
      from[lane] = y + (m - rows.begin) * N;
      to[lane] = dy + (m - rows.begin) * N;
      if (loss.classes) {
        const int64_t c = loss.classes[m * loss.classes_stride];
        target[lane] = c == loss.ignore_index ? T(-1) : static_cast<T>(c);
      } else {
        for (int64_t n = 0; n < N; ++n) target[n * lanes + lane] = scalar(at<S>(loss.target, m, n));
      }
    }
    gather(from, N, z);
    std::array<double, lanes> totals{};
    SumOfEachLane<T> sums{totals.data(), {}};
    row_losses_in_lanes<T>(l, Vec<T>(static_cast<T>(loss.scale)), loss.classes != nullptr, 1,
                           RowOfEachLane<T>{z, target, loss.weight ? weight : nullptr, dz, N, {}}, sums);
    scatter(dz, N, to, static_cast<int>(used));
    for (int64_t lane = 0; lane < used; ++lane) total += totals[lane];
  }
  return total;
}

template <class T>
void loss_in_lanes(const Loss& loss, bool of_classes, int64_t rows, int64_t N, const void* y_data, void* dy_data,
                   const double* scales, double* totals, bool* valid) {
  constexpr int lanes = Vec<T>::lanes;
  const T *const y = static_cast<const T*>(y_data), *const t = static_cast<const T*>(loss.target.data),
                 *const w = static_cast<const T*>(loss.weight);
  T* const dy = static_cast<T*>(dy_data);
  Vec<T> scale;
  for (int lane = 0; lane < lanes; ++lane) scale.v[lane] = static_cast<T>(scales[lane]);
  SumOfEachLane<T> sums{totals, {}};
  const int64_t size = rows * N * lanes, part = w ? N * lanes : size;
  visit(*loss.function, [&](auto l) {
    using LossOf = decltype(l);
    if constexpr (is_of_rows<LossOf>)
      row_losses_in_lanes(l, scale, of_classes, rows, RowOfEachLane<T>{y, t, w, dy, N, {}}, sums);
    else
      for (int64_t i = 0; i < size; i += part) element_loss<T>(l, scale, part, y + i, t + i, w, dy + i, sums);
    if constexpr (is_of_probabilities<LossOf>)
      for (int lane = 0; lane < lanes; ++lane) valid[lane] = valid[lane] && sums.refused.v[lane] == 0;
  });
}

// ---- losses of a network ----

template <class S, class LossOf>
double row_losses(const Loss& loss, Range rows, int64_t N, const void* y_data, void* dy_data) {
  using T = Accumulator<S>;
  const auto l = get<LossOf>(*loss.function);
  const T* y = static_cast<const T*>(y_data);
  T* dy = static_cast<T*>(dy_data);
  if (0 < N && N <= kFewOutputsOfLoss) return few_outputs_losses<S>(l, loss, rows, N, y, dy);
  double total = 0;
  for (int64_t m = rows.begin; m < rows.end && N > 0; ++m, y += N, dy += N) {
    const int64_t c = loss.classes ? loss.classes[m * loss.classes_stride] : -1;
    const LossRow<S> row{loss, m, N, c, y, dy};
    if (loss.classes && c == loss.ignore_index)
      l.template ignored_row<T>(row, N);
    else
      total += l.template row<T>(row, N, static_cast<T>(loss.scale));
  }
  return total;
}

template <class S>
double loss(const Loss& loss, Range rows, int64_t N, const void* y_data, void* dy_data, void* scratch, bool& valid) {
  using T = Accumulator<S>;
  return visit(*loss.function, [&](auto l) {
    using LossOf = decltype(l);
    if constexpr (is_of_rows<LossOf>) {
      return row_losses<S, LossOf>(loss, rows, N, y_data, dy_data);
    } else {
      const T* const y = static_cast<const T*>(y_data);
      T* const dy = static_cast<T*>(dy_data);
      const T* const t = contiguous<S>(loss.target, rows, N, static_cast<T*>(scratch));
      const int64_t size = rows.size() * N;
      if (!loss.weight) {
        SumOfAll<T> sum{valid};
        element_loss<T>(l, static_cast<T>(loss.scale), size, y, t, nullptr, dy, sum);
        return sum.total;
      }
      T* const w = static_cast<T*>(scratch) + size;
      contiguous<S>({loss.weight, 0}, {0, 1}, N, w);
      double total = 0;
      for (int64_t i = 0; i < size; i += N) {
        SumOfAll<T> sum{valid};
        element_loss<T>(l, static_cast<T>(loss.scale), N, y + i, t + i, w, dy + i, sum);
        total += sum.total;
      }
      return total;
    }
  });
}

// ---- updates ----

template <class S, class Opt>
__attribute__((flatten)) void update(const Update& update, int64_t begin, int64_t stride, ConstMatrix gradients,
                                     int64_t rows, int64_t columns) {
  using T = Accumulator<S>;
  using V = Vec<T>;
  static_assert(std::size(Update{}.states) == kMaxStates);
  const auto optimizer = get<Opt>(*update.optimizer);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t first = begin + r * stride;
    for_vectors<T>(columns, [&](int64_t c, auto lanes) {
      S* const p = static_cast<S*>(update.parameter) + first + c;
      V parameter = load(p, lanes), states[kMaxStates];
      for (size_t s = 0; s < Opt::states.size(); ++s)
        if (update.states[s]) states[s] = load(static_cast<const S*>(update.states[s]) + first + c, lanes);
      optimizer.update(parameter, states, load(at<T>(gradients, r, c), lanes));
      for (size_t s = 0; s < Opt::states.size(); ++s)
        if (update.states[s]) store(static_cast<S*>(update.states[s]) + first + c, states[s], lanes);
      store(p, parameter, lanes);
    });
  }
}

template <class S>
constexpr PointwiseKernels kPointwise{
    [](const Activation& activation, ConstMatrix z, Matrix y, int64_t rows, int64_t columns, bool past_caches) {
      static constexpr auto table = table_of(Activations{}, []<class Act>() { return &act<S, Act>; });
      table[activation.index](activation, z, y, rows, columns, past_caches);
    },
    [](const Activation& activation, ConstMatrix dy, ConstMatrix saved, Matrix dz, void* db, int64_t rows,
       int64_t columns) {
      static constexpr auto table = table_of(Activations{}, []<class Act>() { return &grad_z<S, Act>; });
      table[activation.index](activation, dy, saved, dz, db, rows, columns);
    },
    loss<S>, loss_in_lanes<Accumulator<S>>,
    [](const Update& u, int64_t begin, int64_t stride, ConstMatrix gradients, int64_t rows, int64_t columns) {
      static constexpr auto table = table_of(Optimizers{}, []<class Opt>() { return &update<S, Opt>; });
      table[u.optimizer->index](u, begin, stride, gradients, rows, columns);
    }};

}  // namespace

namespace MLP_EXT_TARGET {

const PointwiseKernels& pointwise(DType dtype) {
  static constexpr std::array table{&kPointwise<float>, &kPointwise<double>, &kPointwise<BFloat16>, &kPointwise<Half>};
  return *table[static_cast<size_t>(dtype)];
}

}  // namespace MLP_EXT_TARGET
}  // namespace mlp_ext::cpu
