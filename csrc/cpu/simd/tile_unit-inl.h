// The AMX tile unit, and the same instructions in plain C++ for processors without it, so that one source of kernels
// is tested everywhere. A tile has 16 rows of 64 bytes: 16 floats, or 32 bfloat16.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/vec-inl.h"

namespace mlp_ext::cpu {
namespace {

constexpr int kTileSide = 16;  // rows, and floats or pairs of bfloat16 in a row
constexpr int64_t kTileRowBytes = 64;
constexpr int64_t kTileElements = 2 * kTileSide * kTileSide;  // of bfloat16

#if MLP_EXT_VECTOR_BYTES == 64
// One instance per thread at a time: it configures all tiles, and clears them at the end, so that the kernel need not
// save them when it switches threads.
class TileUnit {
 public:
  TileUnit() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int t = 0; t < 8; ++t) {
      config.row_bytes[t] = kTileRowBytes;
      config.rows[t] = kTileSide;
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~TileUnit() { asm volatile("tilerelease"); }
  TileUnit(const TileUnit&) = delete;

  template <int t>
  MLP_EXT_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(t));
  }
  template <int t>
  MLP_EXT_INLINE void load(const void* p, int64_t stride = kTileRowBytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(t) : "memory");
  }
  // For data that is read once: L1 keeps the rest.
  template <int t>
  MLP_EXT_INLINE void stream(const void* p) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(kTileRowBytes), "i"(t) : "memory");
  }
  template <int t>
  MLP_EXT_INLINE void store(void* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(t) : "memory");
  }
  // c += a b, for a [16, 32], and b [32, 16] as 16 rows of pairs.
  template <int c, int a, int b>
  MLP_EXT_INLINE void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  }

  // Rounds two vectors to pairs.
  static U32 pairs(Vec<float> low, Vec<float> high) {
    const auto both = bit_cast<__m512i>(_mm512_cvtne2ps_pbh((__m512)high.v, (__m512)low.v));
    alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return bit_cast<U32>(_mm512_permutexvar_epi16(_mm512_load_si512(order), both));
  }
  // Rounds and stores a row of up to 32 numbers.
  static void store_row(BFloat16* p, const Vec<float> (&row)[2], int columns, bool past_caches) {
    const auto rounded = bit_cast<__m512i>(_mm512_cvtne2ps_pbh((__m512)row[1].v, (__m512)row[0].v));
    if (columns < 2 * kTileSide)
      _mm512_mask_storeu_epi16(p, (uint32_t(1) << columns) - 1, rounded);
    else if (past_caches && reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(p), rounded);
    else
      _mm512_storeu_si512(p, rounded);
  }
};
#endif

class PlainTileUnit {
 public:
  template <int t>
  void zero() {
    std::memset(tiles_[t], 0, sizeof(tiles_[t]));
  }
  template <int t>
  void load(const void* p, int64_t stride = kTileRowBytes) {
    for (int r = 0; r < kTileSide; ++r)
      std::memcpy(tiles_[t][r], static_cast<const char*>(p) + r * stride, kTileRowBytes);
  }
  template <int t>
  void stream(const void* p) {
    load<t>(p);
  }
  template <int t>
  void store(void* p, int64_t stride) {
    for (int r = 0; r < kTileSide; ++r) std::memcpy(static_cast<char*>(p) + r * stride, tiles_[t][r], kTileRowBytes);
  }
  template <int c, int a, int b>
  void dot() {
    for (int m = 0; m < kTileSide; ++m)
      for (int k = 0; k < kTileSide; ++k)
        for (int n = 0; n < kTileSide; ++n)
          for (const bool high : {false, true}) {
            const float product = half(tiles_[a][m][k], high) * half(tiles_[b][k][n], high);
            tiles_[c][m][n] = bit_cast<uint32_t>(bit_cast<float>(tiles_[c][m][n]) + product);
          }
  }

  static U32 pairs(Vec<float> low, Vec<float> high) {
    return __builtin_convertvector(from_float(low, BFloat16{}), U32) |
           __builtin_convertvector(from_float(high, BFloat16{}), U32) << 16;
  }
  static void store_row(BFloat16* p, const Vec<float> (&row)[2 * kTileSide / kLanes], int columns, bool) {
    for (int c = 0; c < columns; c += kLanes) cpu::store(p + c, row[c / kLanes], std::min(kLanes, columns - c));
  }

 private:
  static float half(uint32_t pair, bool high) { return bit_cast<float>(high ? pair & 0xffff0000u : pair << 16); }

  uint32_t tiles_[8][kTileSide][kTileSide];
};

}  // namespace
}  // namespace mlp_ext::cpu
