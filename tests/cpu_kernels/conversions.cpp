// Conversions of 16-bit types, and loads and stores of some lanes.
#include "arrays.h"
// After the shared headers.
#include TARGET_HEADER
// After the target.
#include "cpu/simd/vec-inl.h"

namespace mlp_ext::cpu {
namespace {

bool same(double a, double b) { return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b); }

// All numbers of S; floats halfway between neighbours and beside these, overflows, subnormals, NaN.
template <class S>
void convert(Report& report) {
  int wrong_loads = 0, wrong_stores = 0;
  const auto store_one = [&](float x) {
    S found[kLanes];
    store(found, Vec<float>(x));
    if (!same(value(found[0]), value(rounded<S>(x)))) ++wrong_stores;
  };
  for (int bits = 0; bits < 1 << 16; ++bits) {
    const S s{static_cast<uint16_t>(bits)}, next{static_cast<uint16_t>(bits + 1)};
    S many[kLanes];
    std::fill(many, many + kLanes, s);
    const float x = load(many).v[kLanes - 1];
    if (!same(x, value(s))) ++wrong_loads;
    store_one(x);
    const bool is_largest = std::isfinite(value(s)) && std::isinf(value(next));
    const double step = is_largest ? value(s) - value(S{static_cast<uint16_t>(bits - 1)}) : value(next) - value(s);
    const auto middle = static_cast<float>(value(s) + step / 2);
    if (!std::isfinite(middle)) continue;
    for (const float near : {middle, std::nextafter(middle, INFINITY), std::nextafter(middle, -INFINITY)})
      store_one(near);
  }
  using Limits = std::numeric_limits<float>;
  for (const float x : {Limits::max(), Limits::min(), Limits::denorm_min(), Limits::infinity(), 65520.f, 65519.99f})
    for (const float signed_x : {x, -x}) store_one(signed_x);
  for (uint32_t mantissa = 1; mantissa < 1 << 23; mantissa *= 2) {  // NaN stays NaN, also where high bits are 0
    const uint32_t nan = 0x7f800000 | mantissa;
    float x;
    std::memcpy(&x, &nan, sizeof(x));
    store_one(x);
  }
  report.check(wrong_loads == 0, "loads", std::to_string(wrong_loads) + " numbers wrong");
  report.check(wrong_stores == 0, "stores", std::to_string(wrong_stores) + " numbers wrong");
}

template <class S>
void lanes(Report& report) {
  using V = Vec<Accumulator<S>>;
  Random random;
  for (int n = 1; n <= V::lanes; ++n) {
    Array<S> from(random, 1, n), to(1, n);
    const V v = load(from.data(), n);
    for (int i = 0; i < V::lanes; ++i) report.check(v.v[i] == (i < n ? from(0, i) : 0), "load of some lanes");
    store(to.data(), v, n);
    for (int i = 0; i < n; ++i) report.check(to(0, i) == from(0, i), "store of some lanes");
    report.check(to.is_alone(), "store of some lanes");
  }
}

template <class S>
void test(Report& report) {
  report.subject = Format<S>::name;
  if constexpr (sizeof(S) == 2) convert<S>(report);
  lanes<S>(report);
}

}  // namespace

void test_conversions(Report& report) {
  test<float>(report);
  test<double>(report);
  test<BFloat16>(report);
  test<Half>(report);
}

}  // namespace mlp_ext::cpu
