// Vec<T>: a processor register of float or double, as GCC and Clang vector extensions, so that one source serves every
// instruction set; loads and stores that convert 16-bit types; sqrt, exp, expm1, tanh, erf, log and log1p.
// Wants MLP_EXT_VECTOR_BYTES: 16, 32 (AVX2, FMA, F16C) or 64 (AVX-512 F, BW, VL, DQ).
#pragma once

#include "cpu/kernels.h"

// The compiler stops inlining where a file has many kernels, and a call costs more than these functions. Loads, stores
// and transpose() are left to it: always inlined, they cost the dots path a tenth.
#define MLP_EXT_INLINE __attribute__((always_inline)) inline

namespace mlp_ext::cpu {
namespace {  // one copy per instruction set

constexpr int kVectorBytes = MLP_EXT_VECTOR_BYTES;

// The attribute needs a type that depends on no template parameter.
template <class T>
struct Registers;
template <>
struct Registers<float> {
  typedef float Native __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t Unsigned __attribute__((vector_size(kVectorBytes)));
  typedef float Memory __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};
template <>
struct Registers<double> {
  typedef double Native __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Bits __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t Unsigned __attribute__((vector_size(kVectorBytes)));
  typedef double Memory __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};

template <class T>
struct Vec {
  using Native = typename Registers<T>::Native;
  using Bits = typename Registers<T>::Bits;  // comparisons give -1 where true
  using Memory = typename Registers<T>::Memory;
  struct Mask {
    Bits bits;
  };
  static constexpr int lanes = kVectorBytes / sizeof(T);

  Native v;

  MLP_EXT_INLINE Vec() : v{} {}
  MLP_EXT_INLINE Vec(T scalar) : v(scalar - Native{}) {}  // x - 0 is x, also for -0
  MLP_EXT_INLINE explicit Vec(Native native) : v(native) {}

  MLP_EXT_INLINE friend Vec operator-(Vec a) { return Vec(-a.v); }
  MLP_EXT_INLINE friend Vec operator+(Vec a, Vec b) { return Vec(a.v + b.v); }
  MLP_EXT_INLINE friend Vec operator-(Vec a, Vec b) { return Vec(a.v - b.v); }
  MLP_EXT_INLINE friend Vec operator*(Vec a, Vec b) { return Vec(a.v * b.v); }
  MLP_EXT_INLINE friend Vec operator/(Vec a, Vec b) { return Vec(a.v / b.v); }
  MLP_EXT_INLINE friend Mask operator<(Vec a, Vec b) { return {a.v < b.v}; }
  MLP_EXT_INLINE friend Mask operator<=(Vec a, Vec b) { return {a.v <= b.v}; }
  MLP_EXT_INLINE friend Mask operator|(Mask a, Mask b) { return {a.bits | b.bits}; }
  MLP_EXT_INLINE friend Vec where(Mask m, Vec a, Vec b) { return Vec(m.bits ? a.v : b.v); }
};

// ---- memory: load(p), load(p, n), store(p, v), store(p, v, n); with n, only the first n lanes are touched ----

template <class T, class = std::enable_if_t<std::is_floating_point_v<T>>>
inline Vec<T> load(const T* p) {
  return Vec<T>(typename Vec<T>::Native(*reinterpret_cast<const typename Vec<T>::Memory*>(p)));
}

template <class T>
inline void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename Vec<T>::Memory*>(p) = v.v;
}

#if MLP_EXT_VECTOR_BYTES == 64
inline __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }
inline Vec<float> load(const float* p, int n) {
  return Vec<float>((Vec<float>::Native)_mm512_maskz_loadu_ps(first_lanes(n), p));
}
inline Vec<double> load(const double* p, int n) {
  return Vec<double>((Vec<double>::Native)_mm512_maskz_loadu_pd(static_cast<__mmask8>(first_lanes(n)), p));
}
inline void store(float* p, Vec<float> v, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)v.v); }
inline void store(double* p, Vec<double> v, int n) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first_lanes(n)), (__m512d)v.v);
}
#elif MLP_EXT_VECTOR_BYTES == 32
template <class Int>
inline __m256i first_lanes(int n) {  // a window into 8 or 4 times -1, then as many 0
  constexpr int lanes = 32 / sizeof(Int);
  alignas(32) static constexpr Int window[16] = {
      -1, -1, -1, -1, lanes == 8 ? -1 : 0, lanes == 8 ? -1 : 0, lanes == 8 ? -1 : 0, lanes == 8 ? -1 : 0};
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(window + lanes - n));
}
inline Vec<float> load(const float* p, int n) {
  return Vec<float>((Vec<float>::Native)_mm256_maskload_ps(p, first_lanes<int32_t>(n)));
}
inline Vec<double> load(const double* p, int n) {
  return Vec<double>((Vec<double>::Native)_mm256_maskload_pd(p, first_lanes<int64_t>(n)));
}
inline void store(float* p, Vec<float> v, int n) { _mm256_maskstore_ps(p, first_lanes<int32_t>(n), (__m256)v.v); }
inline void store(double* p, Vec<double> v, int n) { _mm256_maskstore_pd(p, first_lanes<int64_t>(n), (__m256d)v.v); }
#else
template <class T, class = std::enable_if_t<std::is_floating_point_v<T>>>
inline Vec<T> load(const T* p, int n) {
  Vec<T> v;
  for (int i = 0; i < Vec<T>::lanes; ++i) v.v[i] = i < n ? p[i] : T(0);
  return v;
}
template <class T>
inline void store(T* p, Vec<T> v, int n) {
  for (int i = 0; i < Vec<T>::lanes; ++i)
    if (i < n) p[i] = v.v[i];
}
#endif

// ---- 16-bit types: read as float, rounded to nearest even when written ----

constexpr int kLanes = Vec<float>::lanes;
typedef uint16_t U16 __attribute__((vector_size(2 * kLanes)));
typedef uint16_t U16Memory __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));
typedef uint32_t U32 __attribute__((vector_size(4 * kLanes)));

template <class To, class From>
MLP_EXT_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline Vec<float> to_float(U16 bits, BFloat16) {
  return Vec<float>(bit_cast<Vec<float>::Native>(__builtin_convertvector(bits, U32) << 16));
}

inline U16 from_float(Vec<float> x, BFloat16) {
  const U32 bits = bit_cast<U32>(x.v);
  const U32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const U32 nan = U32{} + 0x7fc0;
  return __builtin_convertvector(x.v != x.v ? nan : rounded, U16);
}

#if MLP_EXT_VECTOR_BYTES == 64
inline Vec<float> to_float(U16 bits, Half) {
  return Vec<float>((Vec<float>::Native)_mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(bits)));
}
inline U16 from_float(Vec<float> x, Half) {
  return bit_cast<U16>(_mm512_maskz_cvtps_ph(0xffff, (__m512)x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif MLP_EXT_VECTOR_BYTES == 32
inline Vec<float> to_float(U16 bits, Half) {
  return Vec<float>((Vec<float>::Native)_mm256_cvtph_ps(bit_cast<__m128i>(bits)));
}
inline U16 from_float(Vec<float> x, Half) {
  return bit_cast<U16>(_mm256_cvtps_ph((__m256)x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
inline Vec<float> to_float(U16 bits16, Half) {
  using F32 = Vec<float>::Native;
  const U32 bits = __builtin_convertvector(bits16, U32);
  const U32 magnitude = (bits & 0x7fff) << 13;
  const U32 scaled = bit_cast<U32>(bit_cast<F32>(magnitude) * 0x1p112f);  // subnormals come out right
  const U32 value = magnitude >= (0x7c00u << 13) ? magnitude | 0x7f800000 : scaled;
  return Vec<float>(bit_cast<F32>(value | ((bits & 0x8000) << 16)));
}
inline U16 from_float(Vec<float> x, Half) {
  using F32 = Vec<float>::Native;
  const U32 bits = bit_cast<U32>(x.v);
  const U32 sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  const U32 normal = (magnitude + 0xc8000fff + ((magnitude >> 13) & 1)) >> 13;
  const U32 subnormal = bit_cast<U32>(bit_cast<F32>(magnitude) + 0.5f) - 0x3f000000;  // 0.5f has the same ulp
  const U32 infinity = U32{} + 0x7c00, nan = U32{} + 0x7e00;
  U32 value = magnitude < 0x38800000 ? subnormal : normal;
  value = magnitude >= 0x47800000 ? infinity : value;  // normal rounds [65520, 65536) to infinity by itself
  value = magnitude > 0x7f800000 ? nan : value;
  return __builtin_convertvector(value | sign, U16);
}
#endif

template <class S>
using Is16Bit = std::enable_if_t<sizeof(S) == 2>;

template <class S, class = Is16Bit<S>>
inline Vec<float> load(const S* p) {
  return to_float(U16(*reinterpret_cast<const U16Memory*>(p)), S{});
}
template <class S, class = Is16Bit<S>>
inline void store(S* p, Vec<float> v) {
  *reinterpret_cast<U16Memory*>(p) = from_float(v, S{});
}
#if MLP_EXT_VECTOR_BYTES == 64
template <class S, class = Is16Bit<S>>
inline Vec<float> load(const S* p, int n) {
  return to_float(bit_cast<U16>(_mm256_maskz_loadu_epi16(first_lanes(n), p)), S{});
}
template <class S, class = Is16Bit<S>>
inline void store(S* p, Vec<float> v, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), bit_cast<__m256i>(from_float(v, S{})));
}
#else
template <class S, class = Is16Bit<S>>
inline Vec<float> load(const S* p, int n) {
  U16 bits{};
  std::memcpy(&bits, p, 2 * n);
  return to_float(bits, S{});
}
template <class S, class = Is16Bit<S>>
inline void store(S* p, Vec<float> v, int n) {
  const U16 bits = from_float(v, S{});
  std::memcpy(p, &bits, 2 * n);
}
#endif

// Stands for a count of lanes, where it is all of them and known at compile time.
struct AllLanes {};
template <class S>
inline auto load(const S* p, AllLanes) {
  return load(p);
}
template <class S, class V>
inline void store(S* p, V v, AllLanes) {
  store(p, v);
}

// store() that may go past the caches, where whole vectors are aligned: their lines are then not read first. Other
// threads see it after end_of_streams().
template <class S, class V>
inline void store_result(S* p, V v, AllLanes, bool past_caches) {
#if MLP_EXT_VECTOR_BYTES >= 32
  const auto bits = [&] {
    if constexpr (sizeof(S) == 2)
      return from_float(v, S{});
    else
      return v.v;
  }();
  if (past_caches && reinterpret_cast<uintptr_t>(p) % sizeof(bits) == 0) {
#if MLP_EXT_VECTOR_BYTES == 64
    if constexpr (sizeof(bits) == 64)
      return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bit_cast<__m512i>(bits));
#endif
    if constexpr (sizeof(bits) == 32)
      return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bit_cast<__m256i>(bits));
    if constexpr (sizeof(bits) == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), bit_cast<__m128i>(bits));
  }
#endif
  store(p, v);
}
template <class S, class V>
inline void store_result(S* p, V v, int n, bool) {
  store(p, v, n);
}
inline void end_of_streams() {
#if MLP_EXT_VECTOR_BYTES >= 32
  _mm_sfence();
#endif
}

// Lanes of a and, counting on, of b.
template <class Native, class Bits>
inline Native shuffle(Native a, Native b, Bits lanes) {
#if defined(__clang__)  // __builtin_shuffle is GCC's
  constexpr int count = sizeof(Native) / sizeof(a[0]);
  Native picked;
#pragma clang loop unroll(full)
  for (int i = 0; i < count; ++i) picked[i] = lanes[i] < count ? a[lanes[i]] : b[lanes[i] - count];
  return picked;
#else
  return __builtin_shuffle(a, b, lanes);
#endif
}

// Rows to columns: for each bit of the lane number, swap the blocks that lie across the diagonal.
template <class T>
inline void transpose(Vec<T> (&rows)[Vec<T>::lanes]) {
  constexpr int lanes = Vec<T>::lanes;
#pragma GCC unroll 4
  for (int bit = 1; bit < lanes; bit *= 2) {
    typename Vec<T>::Bits low{}, high{};
#pragma GCC unroll 16
    for (int l = 0; l < lanes; ++l) {
      low[l] = l & bit ? lanes + l - bit : l;
      high[l] = l & bit ? lanes + l : l + bit;
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      if (i & bit) continue;
      const auto a = rows[i].v, b = rows[i | bit].v;
      rows[i].v = shuffle(a, b, low);
      rows[i | bit].v = shuffle(a, b, high);
    }
  }
}

// ---- functions: sqrt ----

// sqrt(x), rounded as std::sqrt is.
#if MLP_EXT_VECTOR_BYTES == 64
MLP_EXT_INLINE Vec<float> sqrt(Vec<float> x) {
  return Vec<float>((Vec<float>::Native)_mm512_maskz_sqrt_ps(-1, (__m512)x.v));
}
MLP_EXT_INLINE Vec<double> sqrt(Vec<double> x) {
  return Vec<double>((Vec<double>::Native)_mm512_maskz_sqrt_pd(-1, (__m512d)x.v));
}
#elif MLP_EXT_VECTOR_BYTES == 32
MLP_EXT_INLINE Vec<float> sqrt(Vec<float> x) { return Vec<float>((Vec<float>::Native)_mm256_sqrt_ps((__m256)x.v)); }
MLP_EXT_INLINE Vec<double> sqrt(Vec<double> x) {
  return Vec<double>((Vec<double>::Native)_mm256_sqrt_pd((__m256d)x.v));
}
#else
template <class T>
MLP_EXT_INLINE Vec<T> sqrt(Vec<T> x) {
  for (int i = 0; i < Vec<T>::lanes; ++i) x.v[i] = std::sqrt(x.v[i]);
  return x;
}
#endif

// ---- exp, expm1, tanh: range reduction and approximations of the Cephes library (S. Moshier) ----

template <class T>
MLP_EXT_INLINE Vec<T> polynomial(Vec<T>, T c) {
  return c;
}
template <class T, class... Higher>
MLP_EXT_INLINE Vec<T> polynomial(Vec<T> x, T c, Higher... higher) {  // c + x (...), the constant first
  return polynomial(x, higher...) * x + c;
}

// y, which has the sign of x except where it is 0. (GCC 12 makes scalar code of one more comparison with x.)
template <class T>
MLP_EXT_INLINE Vec<T> signed_as(Vec<T> x, Vec<T> y) {
  using Bits = typename Vec<T>::Bits;
  const Bits sign = bit_cast<Bits>(x.v) & bit_cast<Bits>(Vec<T>(T(-0.)).v);
  return Vec<T>(bit_cast<typename Vec<T>::Native>(bit_cast<Bits>(y.v) | sign));
}

template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float low = -104.f, high = 89.f, round = 0x1.8p23f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float minus_one = -20.f;  // expm1 rounds to -1 below
  static constexpr int mantissa_bits = 23, bias = 127;
};
template <>
struct ExpConstants<double> {
  static constexpr double low = -746., high = 710., round = 0x1.8p52;
  static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
  static constexpr double minus_one = -40.;
  static constexpr int mantissa_bits = 52, bias = 1023;
};

// x = n ln 2 + r with |r| <= ln 2 / 2
template <class T>
struct Reduced {
  typename Vec<T>::Bits n;
  Vec<T> r;
};
template <class T>
MLP_EXT_INLINE Reduced<T> reduce(Vec<T> x) {
  using C = ExpConstants<T>;
  using V = Vec<T>;
  using Bits = typename V::Bits;
  const V shifted = x * V(T(1.44269504088896340736)) + C::round;  // n in the low bits
  const V n = shifted - C::round;
  return {bit_cast<Bits>(shifted.v) - bit_cast<Bits>(V(C::round).v), x - n * C::ln2_high - n * C::ln2_low};
}

template <class T>
MLP_EXT_INLINE Vec<T> power_of_2(typename Vec<T>::Bits n) {
  using C = ExpConstants<T>;
  return Vec<T>(bit_cast<typename Vec<T>::Native>((n + C::bias) << C::mantissa_bits));
}

MLP_EXT_INLINE Vec<float> expm1_reduced(Vec<float> r) {  // exp(r) - 1
  Vec<float> p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * (r * r) + r;
}
MLP_EXT_INLINE Vec<float> exp_reduced(Vec<float> r) { return expm1_reduced(r) + 1; }

// A minimax polynomial, since 2 p / (q - p) of exp_reduced is up to 3.3 ULP from exp(r) - 1.
MLP_EXT_INLINE Vec<double> expm1_reduced(Vec<double> r) {
  return polynomial(r, 0.5, 0.16666666666666677, 0.041666666666666664, 0.008333333333321763, 0.0013888888888886214,
                    0.00019841269886081215, 2.480158731737065e-05, 2.755724401760971e-06, 2.75572836505668e-07,
                    2.5109174085467473e-08, 2.091063361947768e-09) *
             (r * r) +
         r;
}

MLP_EXT_INLINE Vec<double> exp_reduced(Vec<double> r) {
  const Vec<double> s = r * r;
  Vec<double> p = 1.26177193074810590878e-4;
  p = p * s + 3.02994407707441961300e-2;
  p = (p * s + 9.99999999999999999910e-1) * r;
  Vec<double> q = 3.00198505138664455042e-6;
  q = q * s + 2.52448340349684104192e-3;
  q = q * s + 2.27265548208155028766e-1;
  q = q * s + 2;
  return 1 + 2 * p / (q - p);
}

// exp(x) over the whole range: within 2 ULP of the true value, exact 0 and infinity beyond, NaN for NaN.
template <class T>
MLP_EXT_INLINE Vec<T> exp(Vec<T> x) {
  using C = ExpConstants<T>;
  x = where(x < Vec<T>(C::low), Vec<T>(C::low), x);
  x = where(Vec<T>(C::high) < x, Vec<T>(C::high), x);
  const auto [n, r] = reduce(x);
  const auto half = n >> 1;  // 2^n as two factors, so that neither under- nor overflows
  return exp_reduced(r) * power_of_2<T>(half) * power_of_2<T>(n - half);
}

// exp(x) - 1 over the whole range: max 2 ULP, exactly -1 and infinity beyond, NaN for NaN, -0 for -0.
template <class T>
MLP_EXT_INLINE Vec<T> expm1(Vec<T> x) {
  using C = ExpConstants<T>;
  const Vec<T> given = x;
  x = where(x < Vec<T>(C::minus_one), Vec<T>(C::minus_one), x);
  x = where(Vec<T>(C::high) < x, Vec<T>(C::high), x);
  const auto [n, r] = reduce(x);
  const auto half = n >> 1;
  const Vec<T> inverse = power_of_2<T>(-half) * power_of_2<T>(half - n);  // 2^-n
  const Vec<T> y = (expm1_reduced(r) + (1 - inverse)) * power_of_2<T>(half) * power_of_2<T>(n - half);
  return signed_as(given, y);
}

MLP_EXT_INLINE Vec<float> tanh_small(Vec<float> x) {  // |x| < 0.625
  const Vec<float> s = x * x;
  Vec<float> p = -5.70498872745e-3f;
  p = p * s + 2.06390887954e-2f;
  p = p * s + -5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s + -3.33332819422e-1f;
  return p * s * x + x;
}

MLP_EXT_INLINE Vec<double> tanh_small(Vec<double> x) {
  const Vec<double> s = x * x;
  Vec<double> p = -9.64399179425052238628e-1;
  p = p * s + -9.92877231001918586564e1;
  p = p * s + -1.61468768441708447952e3;
  Vec<double> q = s + 1.12811678491632931402e2;
  q = q * s + 2.23548839060100448583e3;
  q = q * s + 4.84406305325125486048e3;
  return x * s * (p / q) + x;
}

// tanh(x): within 2 ULP, exactly +-1 beyond, NaN for NaN, 0 for -0.
template <class T>
MLP_EXT_INLINE Vec<T> tanh(Vec<T> x) {
  const Vec<T> magnitude = where(x < 0, -x, x);
  const Vec<T> large = 1 - 2 / (exp(2 * magnitude) + 1);
  return where(magnitude < T(0.625), tanh_small(x), where(x < 0, -large, large));
}

// ---- erf, log, log1p: minimax polynomials, found by Remez's algorithm ----

MLP_EXT_INLINE Vec<float> erf_small(Vec<float> x) {  // |x| <= 1: x + x P(x^2)
  return x * polynomial(x * x, 0.128379166f, -0.376126289f, 0.112836182f, -0.0268551186f, 0.00519071752f,
                        -0.000803060888f, 7.9198413e-05f) +
         x;
}
MLP_EXT_INLINE Vec<double> erf_small(Vec<double> x) {
  return x * polynomial(x * x, 0.12837916709551256, -0.3761263890318334, 0.11283791670936535, -0.02686617064186817,
                        0.00522397759582442, -0.0008548325434942274, 0.00012055278848086931, -1.492443168338523e-05,
                        1.6443709709722242e-06, -1.6180487350618821e-07, 1.3601135084270905e-08,
                        -7.578217406247188e-10) +
         x;
}

// log(1 - erf(x)) on [1, limit], as exactly as 1 - exp() of it needs; from the limit on, erf rounds to 1.
MLP_EXT_INLINE Vec<float> log_erfc(Vec<float> x) {
  constexpr float limit = 4;
  return polynomial(where(Vec<float>(limit) < x, Vec<float>(limit), x), -0.000353722658f, -1.12704003f, -0.638225675f,
                    -0.10303735f, 0.0218053069f, -0.00293960446f, 0.000185573706f);
}
MLP_EXT_INLINE Vec<double> log_erfc(Vec<double> x) {
  constexpr double limit = 6;
  return polynomial(where(Vec<double>(limit) < x, Vec<double>(limit), x), -1.0817706051575695e-06, -1.1283685491109507,
                    -0.6366682551876709, -0.10263592863162552, 0.018862377386170127, 0.0005878883828554855,
                    -0.002102438185233161, 0.0009226386957248553, -0.0002321875327112131, 2.8682620496887928e-05,
                    3.3750006741664593e-06, -2.6106372143177777e-06, 6.75366584540678e-07, -1.064322980880818e-07,
                    1.0726218784612118e-08, -6.410672733843165e-10, 1.740318834806437e-11);
}

// erf(x) over the whole range: max 2 ULP, exactly +-1 beyond, NaN for NaN, -0 for -0.
template <class T>
inline Vec<T> erf(Vec<T> x) {
  const Vec<T> magnitude = where(x < 0, -x, x);
  const Vec<T> large = 1 - exp(log_erfc(magnitude));
  return where(magnitude < 1, erf_small(x), where(x < 0, -large, large));
}

// (log((1 + s) / (1 - s)) - 2 s) / s^3 by s^2, for |s| <= 3 - sqrt 8
MLP_EXT_INLINE Vec<float> log_tail(Vec<float> s2) { return polynomial(s2, 0.666667759f, 0.399775684f, 0.298714489f); }
MLP_EXT_INLINE Vec<double> log_tail(Vec<double> s2) {
  return polynomial(s2, 0.6666666666666735, 0.3999999999940935, 0.28571428743687116, 0.22222198428892137,
                    0.18183572360251735, 0.1531383200920681, 0.14798260529062057);
}

template <class T>
struct LogConstants;
template <>
struct LogConstants<float> {
  static constexpr float ln2_high = 0x1.62e3p-1f, ln2_low = 0x1.2fefa4p-17f;  // n ln2_high is exact
  static constexpr float smallest_normal = 0x1p-126f;
  static constexpr int subnormal_shift = 25;
};
template <>
struct LogConstants<double> {
  static constexpr double ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr double smallest_normal = 0x1p-1022;
  static constexpr int subnormal_shift = 54;
};

// log(x 2^-shift) + c for normal x > 0 and a small c. x = 2^n (1 + f) with 1 + f in [sqrt 1/2, sqrt 2), and
// log(1 + f) = f - f^2 / 2 + s (f^2 / 2 + s^2 log_tail(s^2)) with s = f / (2 + f).
template <class T>
MLP_EXT_INLINE Vec<T> log_plus(Vec<T> x, Vec<T> shift, Vec<T> c) {
  using C = LogConstants<T>;
  using E = ExpConstants<T>;
  using V = Vec<T>;
  using Bits = typename V::Bits;
  using Unsigned = typename Registers<T>::Unsigned;  // negative x, whose result is not used, would overflow signed bits
  const auto bits = bit_cast<Unsigned>(x.v), root_half = bit_cast<Unsigned>(V(T(0.70710678118654752440)).v);
  const Bits exponent = bit_cast<Bits>(bits - root_half) >> E::mantissa_bits;
  const V f = V(bit_cast<typename V::Native>(bits - bit_cast<Unsigned>(exponent << E::mantissa_bits))) - 1;
  const V n = V(bit_cast<typename V::Native>(bit_cast<Bits>(V(E::round).v) + exponent)) - E::round - shift;
  const V s = f / (f + 2), s2 = s * s, half = T(0.5) * f * f;
  return n * C::ln2_high - ((half - (s * (half + s2 * log_tail(s2)) + (n * C::ln2_low + c))) - f);
}

// y inside the domain, else as std::log at x: -infinity at `pole`, NaN below it, infinity and NaN for themselves.
template <class T>
MLP_EXT_INLINE Vec<T> log_limits(Vec<T> x, T pole, Vec<T> y) {
  y = where(x <= pole, where(x < pole, Vec<T>(T(NAN)), Vec<T>(-T(INFINITY))), y);
  return where(x < T(INFINITY), y, x);
}

// log(x) over the whole range, subnormals too: max 1 ULP, -infinity at +-0, NaN below and for NaN.
template <class T>
inline Vec<T> log(Vec<T> x) {
  constexpr int shift = LogConstants<T>::subnormal_shift;
  const auto is_subnormal = x < LogConstants<T>::smallest_normal;
  const Vec<T> normal = where(is_subnormal, x * T(int64_t(1) << shift), x);
  return log_limits(x, T(0), log_plus<T>(normal, where(is_subnormal, T(shift), 0), 0));
}

// log(1 + x) over the whole range: max 2 ULP, -infinity at -1, NaN below and for NaN, -0 for -0.
template <class T>
inline Vec<T> log1p(Vec<T> x) {
  const Vec<T> u = x + 1;
  const Vec<T> rounded_off = where(x < 1, x - (u - 1), 1 - (u - x));  // 1 + x = u + rounded_off
  const Vec<T> y = log_limits(x, T(-1), log_plus<T>(u, 0, rounded_off / u));
  return signed_as(x, y);
}

}  // namespace
}  // namespace mlp_ext::cpu
