// Arrays of the kernels' dtypes, and their comparison with numbers in double.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace mlp_ext::cpu {

// TARGET is the instruction set under test, TARGET_HEADER its header in csrc/cpu/targets.
namespace TARGET {
const LayerKernels& layer_kernels(DType);
const StepKernels& step_kernels(DType);
const PanelKernels* panel_kernels(DType);
const LaneKernels* lane_kernels(DType);
const TileKernels& tile_kernels();
int64_t fma_loop(int64_t rounds);
int64_t tile_loop(int64_t rounds);
}  // namespace TARGET

// ---- dtypes, by their definition rather than by the kernels' conversions ----

template <class S>
struct Format {  // float, double
  static constexpr DType dtype = sizeof(S) == 4 ? DType::float32 : DType::float64;
  static constexpr const char* name = sizeof(S) == 4 ? "float32" : "float64";
  static constexpr int mantissa_bits = std::numeric_limits<S>::digits - 1;
};
template <>
struct Format<BFloat16> {
  static constexpr DType dtype = DType::bfloat16;
  static constexpr const char* name = "bfloat16";
  static constexpr int mantissa_bits = 7;
};
template <>
struct Format<Half> {
  static constexpr DType dtype = DType::float16;
  static constexpr const char* name = "float16";
  static constexpr int mantissa_bits = 10;
};

template <class S>
double value(S s) {
  if constexpr (sizeof(S) > 2) {
    return s;
  } else {
    constexpr int bits = Format<S>::mantissa_bits, most = (1 << (15 - bits)) - 1, bias = most / 2;
    const int exponent = s.bits >> bits & most, mantissa = s.bits & ((1 << bits) - 1);
    double magnitude = std::ldexp(mantissa + (exponent ? 1 << bits : 0), std::max(exponent, 1) - bias - bits);
    if (exponent == most) magnitude = mantissa ? NAN : INFINITY;
    return s.bits >> 15 ? -magnitude : magnitude;
  }
}

// To nearest, ties to even.
template <class S>
S rounded(double x) {
  if constexpr (sizeof(S) > 2) {
    return static_cast<S>(x);
  } else {
    constexpr int bits = Format<S>::mantissa_bits, most = (1 << (15 - bits)) - 1, bias = most / 2;
    const int sign = std::signbit(x) ? 1 << 15 : 0, infinity = most << bits;
    if (std::isnan(x)) return {static_cast<uint16_t>(sign | infinity | 1 << (bits - 1))};
    if (std::isinf(x)) return {static_cast<uint16_t>(sign | infinity)};
    if (x == 0) return {static_cast<uint16_t>(sign)};
    int exponent = 0;
    std::frexp(x, &exponent);
    exponent = std::max(exponent - 1, 1 - bias);
    const auto steps = static_cast<int64_t>(std::nearbyint(std::ldexp(std::abs(x), bits - exponent)));
    const int64_t magnitude = steps + (int64_t(exponent + bias - 1) << bits);  // a carry moves to the next exponent
    return {static_cast<uint16_t>(sign | std::min<int64_t>(magnitude, infinity))};
  }
}

template <class S>
constexpr double epsilon = 1 / static_cast<double>(int64_t(1) << Format<S>::mantissa_bits);

// ---- arrays ----

class Random {
 public:
  double operator()(double low, double high) {  // the same on every processor
    return low + (high - low) * static_cast<double>(bits_() >> 11) * 0x1p-53;
  }

 private:
  std::mt19937_64 bits_;
};

// Memory that ends at a page which may not be touched.
class Pages {
 public:
  explicit Pages(size_t bytes) : page_(sysconf(_SC_PAGESIZE)), size_((bytes + page_ - 1) / page_ * page_ + page_) {
    begin_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (begin_ == MAP_FAILED || mprotect(begin_ + size_ - page_, page_, PROT_NONE) != 0) std::abort();
    data_ = begin_ + size_ - page_ - bytes;
  }
  Pages(Pages&& other) noexcept
      : page_(other.page_), size_(other.size_), begin_(std::exchange(other.begin_, nullptr)), data_(other.data_) {}
  ~Pages() {
    if (begin_) munmap(begin_, size_);
  }
  char* data() const { return data_; }

 private:
  size_t page_, size_;
  char *begin_, *data_;
};

// A matrix, misaligned, with NaN before it and in `gap` elements between rows; after its end is no memory. Results
// begin as NaN too.
template <class S>
class Array {
 public:
  const int64_t rows, columns, stride;

  Array(int64_t rows, int64_t columns, int64_t gap = 0)
      : rows(rows), columns(columns), stride(columns + gap), pages_(size() * sizeof(S)) {
    std::fill(elements(), elements() + size(), poison());
  }
  Array(Random& random, int64_t rows, int64_t columns, int64_t gap = 0, double low = -1, double high = 1)
      : Array(rows, columns, gap) {
    fill([&](int64_t, int64_t) { return random(low, high); });
  }

  template <class F>
  Array& fill(const F& f) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) at(i, j) = rounded<S>(f(i, j));
    return *this;
  }
  S* data() { return elements() + kBefore; }
  ConstMatrix in() { return {data(), stride}; }
  Matrix out() { return {data(), stride}; }
  double operator()(int64_t i, int64_t j) const { return value(elements()[kBefore + i * stride + j]); }

  // Whether all that surrounds the elements is as it was.
  bool is_alone() const {
    const S nan = poison();
    for (int64_t e = 0; e < size(); ++e) {
      const bool inside = e >= kBefore && (e - kBefore) % stride < columns;
      if (!inside && std::memcmp(elements() + e, &nan, sizeof(S)) != 0) return false;
    }
    return true;
  }

 private:
  static constexpr int64_t kBefore = 67;
  static S poison() { return rounded<S>(NAN); }
  int64_t size() const { return kBefore + std::max<int64_t>(0, (rows - 1) * stride + columns); }
  S* elements() const { return reinterpret_cast<S*>(pages_.data()); }
  S& at(int64_t i, int64_t j) { return elements()[kBefore + i * stride + j]; }

  Pages pages_;
};

// Workspace of NaN.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : data_(std::aligned_alloc(64, (bytes + 127) / 64 * 64)), bytes_(bytes) {
    std::memset(data_.get(), 0xff, bytes + 64);
  }
  void* data() { return data_.get(); }
  bool is_kept() const {
    const char* const end = static_cast<const char*>(data_.get()) + bytes_;
    return std::all_of(end, end + 64, [](char c) { return c == '\xff'; });
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
  size_t bytes_;
};

// ---- comparison ----

// A matrix in double; terms: the largest sum of the absolute values that are added up to an element.
struct Exact {
  int64_t rows = 0, columns = 0;
  std::vector<double> values = std::vector<double>(rows * columns);
  double terms = 0;

  double& at(int64_t i, int64_t j) { return values[i * columns + j]; }
  double at(int64_t i, int64_t j) const { return values[i * columns + j]; }
  double largest() const {
    double most = 0;
    for (const double v : values) most = std::max(most, std::abs(v));
    return most;
  }
};

template <class S>
Exact exactly(const Array<S>& a) {
  Exact exact{a.rows, a.columns};
  for (int64_t i = 0; i < a.rows; ++i)
    for (int64_t j = 0; j < a.columns; ++j) exact.at(i, j) = a(i, j);
  exact.terms = exact.largest();
  return exact;
}

// Results compared so far, and the wrong ones.
struct Report {
  std::string subject;
  int results = 0, wrong = 0;

  void check(bool right, const char* what, const std::string& why = "") {
    ++results;
    if (right) return;
    if (++wrong <= 40) std::printf("%s: %s %s\n", subject.c_str(), what, why.c_str());
  }

  // |found - exact| <= one rounding of the result, and a few of the terms in the accumulators' type. See
  // tests/references.py, whose measure is native's error on top.
  template <class S>
  void compare(const Array<S>& found, const Exact& exact, const char* what, double times = 1) {
    const double largest = exact.largest();
    const double bound = times * (epsilon<S> * largest + 16 * epsilon<Accumulator<S>> * (exact.terms + largest));
    std::string why;
    for (int64_t i = 0; i < found.rows && why.empty(); ++i)
      for (int64_t j = 0; j < found.columns && why.empty(); ++j)
        if (!(std::abs(found(i, j) - exact.at(i, j)) <= bound)) {
          char text[160];
          std::snprintf(text, sizeof(text), "(%d, %d) is %.9g, not %.9g +- %.2g", int(i), int(j), found(i, j),
                        exact.at(i, j), bound);
          why = text;
        }
    check(why.empty(), what, why);
    check(found.is_alone(), what, "is written past its end");
  }
};

// The tests, one file each.
void test_conversions(Report& report);
void test_layers(Report& report);
void test_steps(Report& report);
void test_lanes(Report& report);

}  // namespace mlp_ext::cpu
