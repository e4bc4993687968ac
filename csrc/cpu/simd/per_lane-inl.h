// Networks in the lanes of a vector: their memory, and optimizers with hyperparameters of each lane.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/pack-inl.h"
#include "cpu/simd/vec-inl.h"
#include "math/optimizers.h"

namespace mlp_ext::cpu {
namespace {

// ---- memory: element i of the network in lane l is at [i lanes + l] ----

constexpr int64_t kTransposed = 4;  // elements from which transpose() is faster than single copies

// Interleaves `count` elements of each lane.
template <class T>
void gather(const T* const* from, int64_t count, T* to) {
  constexpr int lanes = Vec<T>::lanes;
  const auto square = [&](int64_t i, auto n, int size) {
    Vec<T> rows[lanes];
    for (int l = 0; l < lanes; ++l) rows[l] = load(from[l] + i, n);
    transpose(rows);
    for (int j = 0; j < size; ++j) store(to + (i + j) * lanes, rows[j]);
  };
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) square(i, AllLanes{}, lanes);
  if (count - i >= kTransposed) return square(i, static_cast<int>(count - i), static_cast<int>(count - i));
  for (; i < count; ++i)
    for (int l = 0; l < lanes; ++l) to[i * lanes + l] = from[l][i];
}

// The reverse, for the first `used` lanes.
template <class T>
void scatter(const T* from, int64_t count, T* const* to, int used) {
  constexpr int lanes = Vec<T>::lanes;
  for_vectors<T>(count, [&](int64_t i, auto n) {
    Vec<T> rows[lanes];
    for (int64_t j = 0; j < std::min<int64_t>(lanes, count - i); ++j) rows[j] = load(from + (i + j) * lanes);
    transpose(rows);
    for (int l = 0; l < used; ++l) store(to[l] + i, rows[l], n);
  });
}

// ---- optimizers ----

// In registers, so that the compiler moves it out of loops.
MLP_EXT_INLINE Vec<float> to_float(Vec<double> low, Vec<double> high) {
#if MLP_EXT_VECTOR_BYTES == 64
  const auto half = [](Vec<double> v) { return _mm256_castps_pd(_mm512_maskz_cvtpd_ps(-1, (__m512d)v.v)); };
  const __m512d both = _mm512_maskz_insertf64x4(-1, _mm512_castpd256_pd512(half(low)), half(high), 1);
  return Vec<float>((Vec<float>::Native)both);
#elif MLP_EXT_VECTOR_BYTES == 32
  return Vec<float>(
      (Vec<float>::Native)_mm256_set_m128(_mm256_cvtpd_ps((__m256d)high.v), _mm256_cvtpd_ps((__m256d)low.v)));
#else
  constexpr int half = Vec<double>::lanes;
  Vec<float> v;
  for (int i = 0; i < half; ++i) v.v[i] = static_cast<float>(low.v[i]), v.v[half + i] = static_cast<float>(high.v[i]);
  return v;
#endif
}

// A number in double for each lane of a Vec<T>: a Setting of math/optimizers.h. Comparisons look at the first lane.
template <class T>
struct PerLane {
  using V = Vec<double>;
  static constexpr int parts = sizeof(double) / sizeof(T);
  V part[parts];

  PerLane() = default;
  PerLane(double all) {
    for (V& p : part) p = all;
  }
  template <class F>
  static MLP_EXT_INLINE PerLane of(const F& number) {
    PerLane r;
    for (int l = 0; l < Vec<T>::lanes; ++l) r.part[l / V::lanes].v[l % V::lanes] = number(l);
    return r;
  }
  MLP_EXT_INLINE double operator[](int lane) const { return part[lane / V::lanes].v[lane % V::lanes]; }
  bool is_one_number() const {
    for (int l = 1; l < Vec<T>::lanes; ++l)
      if ((*this)[l] != (*this)[0]) return false;
    return true;
  }

  template <class F>
  static MLP_EXT_INLINE PerLane by_parts(const F& f) {
    PerLane r;
    for (int i = 0; i < parts; ++i) r.part[i] = f(i);
    return r;
  }
  MLP_EXT_INLINE friend PerLane operator+(const PerLane& a, const PerLane& b) {
    return by_parts([&](int i) { return a.part[i] + b.part[i]; });
  }
  MLP_EXT_INLINE friend PerLane operator-(const PerLane& a, const PerLane& b) {
    return by_parts([&](int i) { return a.part[i] - b.part[i]; });
  }
  MLP_EXT_INLINE friend PerLane operator*(const PerLane& a, const PerLane& b) {
    return by_parts([&](int i) { return a.part[i] * b.part[i]; });
  }
  MLP_EXT_INLINE friend PerLane operator/(const PerLane& a, const PerLane& b) {
    return by_parts([&](int i) { return a.part[i] / b.part[i]; });
  }
  MLP_EXT_INLINE friend PerLane sqrt(const PerLane& a) {
    return by_parts([&](int i) { return cpu::sqrt(a.part[i]); });
  }
  MLP_EXT_INLINE friend bool operator!=(const PerLane& a, double b) { return a[0] != b; }
  MLP_EXT_INLINE friend bool operator>(const PerLane& a, double b) { return a[0] > b; }

  MLP_EXT_INLINE operator Vec<T>() const {
    if constexpr (parts == 1)
      return part[0];
    else
      return to_float(part[0], part[1]);
  }
};

template <class T>
PerLane<T> pow(const PerLane<T>& a, const PerLane<T>& b) {  // slow, and mostly the same in all lanes
  if (a.is_one_number() && b.is_one_number()) return std::pow(a[0], b[0]);
  return PerLane<T>::of([&](int l) { return std::pow(a[l], b[l]); });
}

// The functors with a PerLane for each Setting.
template <class Setting, class Functor>
struct WithSetting;
template <class Setting, template <class...> class Functor, class... Settings>
struct WithSetting<Setting, Functor<Settings...>> {
  using type = Functor<std::conditional_t<true, Setting, Settings>...>;
};

template <class T, class List>
struct LaneOptimizersOf;
template <class T, class... Functors>
struct LaneOptimizersOf<T, TypeList<Functors...>> {
  using type = TypeList<typename WithSetting<PerLane<T>, Functors>::type...>;
};
template <class T>
using LaneOptimizers = typename LaneOptimizersOf<T, Optimizers>::type;
template <class T>
using LaneOptimizer = Chosen<LaneOptimizers<T>>;

template <class T>
LaneOptimizer<T> lane_optimizer(size_t index, const std::array<const double*, Vec<T>::lanes>& hyperparameters) {
  struct Number {
    const std::array<const double*, Vec<T>::lanes>& of;
    size_t i;
    operator PerLane<T>() const {
      return PerLane<T>::of([&](int l) { return of[l][i]; });
    }
    operator bool() const { return of[0][i] != 0; }
  };
  return visit(LaneOptimizers<T>{}, index, [&](auto functor) {
    return LaneOptimizer<T>(index, make_of<decltype(functor)>([&](size_t i) { return Number{hyperparameters, i}; }));
  });
}

// Ready for step t, counted from 1.
template <class T>
void begin_step(LaneOptimizer<T>& optimizer, const PerLane<T>& t) {
  visit(optimizer, [&](auto o) {
    if constexpr (decltype(o)::counts_steps) {
      o.begin_step(t);
      optimizer = LaneOptimizer<T>(optimizer.index, o);
    }
  });
}

// `size` elements of each lane.
template <class T>
struct LaneUpdate {
  T* parameter;
  T* states[kMaxStates];  // or nullptr
  const T* gradient;
  int64_t size;
};

template <class T, class Opt>
__attribute__((flatten)) void update_lanes(const LaneOptimizer<T>& chosen, const LaneUpdate<T>& given) {
  using V = Vec<T>;
  const auto optimizer = get<Opt>(chosen);
  const LaneUpdate<T> u = given;  // in registers
  for (int64_t i = 0; i < u.size * V::lanes; i += V::lanes) {
    V parameter = load(u.parameter + i), states[kMaxStates];
    for (size_t s = 0; s < Opt::states.size(); ++s)
      if (u.states[s]) states[s] = load(u.states[s] + i);
    optimizer.update(parameter, states, load(u.gradient + i));
    for (size_t s = 0; s < Opt::states.size(); ++s)
      if (u.states[s]) store(u.states[s] + i, states[s]);
    store(u.parameter + i, parameter);
  }
}

template <class T>
void update(const LaneOptimizer<T>& optimizer, const LaneUpdate<T>& u) {
  static constexpr auto table = table_of(LaneOptimizers<T>{}, []<class Opt>() { return &update_lanes<T, Opt>; });
  table[optimizer.index](optimizer, u);
}

// Leaves lanes that do not learn any more as they were. By the same code, since another may round otherwise.
template <class T>
void update_some(const LaneOptimizer<T>& optimizer, const LaneUpdate<T>& u, typename Vec<T>::Mask learns) {
  constexpr int64_t piece = 16, lanes = Vec<T>::lanes;
  alignas(kVectorBytes) T kept[1 + kMaxStates][piece * lanes];
  for (int64_t begin = 0; begin < u.size; begin += piece) {
    const int64_t size = std::min(piece, u.size - begin), first = begin * lanes;
    const auto place = [&](T* of) { return of ? of + first : nullptr; };
    const LaneUpdate<T> part{
        place(u.parameter), {place(u.states[0]), place(u.states[1]), place(u.states[2])}, u.gradient + first, size};
    T* const all[] = {part.parameter, part.states[0], part.states[1], part.states[2]};
    for (size_t i = 0; i < std::size(all); ++i)
      if (all[i]) std::copy(all[i], all[i] + size * lanes, kept[i]);
    update(optimizer, part);
    for (size_t i = 0; i < std::size(all); ++i)
      for (int64_t j = 0; all[i] && j < size * lanes; j += lanes)
        store(all[i] + j, where(learns, load(all[i] + j), load(kept[i] + j)));
  }
}

}  // namespace
}  // namespace mlp_ext::cpu
