// Prints the largest error of each vector function of one instruction set: "function dtype ULP x".
// TARGET is a header of csrc/cpu/targets.
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include TARGET
// After the target.
#include "cpu/simd/vec-inl.h"

namespace mlp_ext::cpu {
namespace {

template <class T>
using Exact = std::conditional_t<sizeof(T) == 4, double, long double>;

// In ULP; infinity where a NaN, an infinity, a zero or the sign of a zero is wrong.
template <class T>
double error(T found, Exact<T> exact, bool keeps_minus_0) {
  using Limits = std::numeric_limits<T>;
  const T expected = static_cast<T>(exact);
  if (std::isnan(expected) && std::isnan(found)) return 0;
  if (std::isinf(expected) && found == expected) return 0;
  if (exact == 0) return found == 0 && (!keeps_minus_0 || std::signbit(found) == std::signbit(expected)) ? 0 : INFINITY;
  Exact<T> value = found;
  if (std::isinf(found)) value = std::copysign(std::ldexp(Exact<T>(1), Limits::max_exponent), value);
  const int exponent = std::max(std::ilogb(exact) + 1, Limits::min_exponent);
  const double ulp = static_cast<double>(std::abs(value - exact) / std::ldexp(Exact<T>(1), exponent - Limits::digits));
  return std::isnan(ulp) ? INFINITY : ulp;
}

template <class T>
std::vector<T> samples() {
  using Limits = std::numeric_limits<T>;
  std::vector<T> xs{0, 1, T(0.5), T(0.625), T(20), T(100), T(800), Limits::max(), Limits::min(), Limits::denorm_min()};
  xs.insert(xs.end(), {Limits::infinity(), Limits::quiet_NaN()});
  for (int e = Limits::min_exponent - Limits::digits; e < Limits::max_exponent; ++e)
    for (const T power = std::ldexp(T(1), e);
         T x : {std::nextafter(power, T(0)), power, std::nextafter(power, T(2) * power)})
      xs.push_back(x);
  std::mt19937_64 bits;
  const auto uniform = [&] { return static_cast<T>(static_cast<double>(bits() >> 11) * 0x1p-53); };
  for (int i = 0; i < 12000; ++i) {
    for (T range : {T(0.4), T(1), T(2), T(8), T(40), T(110), T(750)}) xs.push_back(range * uniform());
    xs.push_back(std::exp2(T(64) * uniform() - T(54)));
    xs.push_back(std::exp2(T(2 * Limits::max_exponent) * (uniform() - T(0.5))));
  }
  for (size_t i = xs.size(); i-- > 0;) xs.push_back(-xs[i]);
  xs.resize(xs.size() / Vec<T>::lanes * Vec<T>::lanes + Vec<T>::lanes, T(1));
  return xs;
}

template <class T, class Function, class Reference>
void report(const char* name, Function function, Reference reference, bool keeps_minus_0) {
  static const std::vector<T> xs = samples<T>();
  double most = 0;
  T where_most = 0;
  for (size_t i = 0; i < xs.size(); i += Vec<T>::lanes) {
    const Vec<T> y = function(load(xs.data() + i));
    for (int lane = 0; lane < Vec<T>::lanes; ++lane) {
      const T x = xs[i + lane];
      const double ulp = error<T>(y.v[lane], reference(static_cast<Exact<T>>(x)), keeps_minus_0);
      if (ulp > most) most = ulp, where_most = x;
    }
  }
  std::printf("%s %s %.3f %.17g\n", name, sizeof(T) == 4 ? "float" : "double", most, static_cast<double>(where_most));
}

template <class T>
void report_all() {
#define MLP_EXT_REPORT(function, keeps_minus_0) \
  report<T>(#function, [](Vec<T> x) { return function(x); }, [](Exact<T> x) { return std::function(x); }, keeps_minus_0)
  MLP_EXT_REPORT(exp, true);
  MLP_EXT_REPORT(expm1, true);
  MLP_EXT_REPORT(tanh, false);
  MLP_EXT_REPORT(erf, true);
  MLP_EXT_REPORT(log, true);
  MLP_EXT_REPORT(log1p, true);
  MLP_EXT_REPORT(sqrt, true);
}

}  // namespace
}  // namespace mlp_ext::cpu

int main() {
  mlp_ext::cpu::report_all<float>();
  mlp_ext::cpu::report_all<double>();
}
