// Kernels of a layer, and the loop that measures peak FLOP/s. Compiled once per instruction set.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/backward_few_rows-inl.h"
#include "cpu/simd/backward_k1_n1-inl.h"
#include "cpu/simd/backward_narrow-inl.h"
#include "cpu/simd/dots-inl.h"
#include "cpu/simd/epilogue-inl.h"
#include "cpu/simd/forward_narrow-inl.h"
#include "cpu/simd/gemm-inl.h"
#include "cpu/simd/pack-inl.h"
#include "cpu/simd/row_sums-inl.h"
#include "cpu/simd/vec-inl.h"

namespace mlp_ext::cpu {
namespace {

// Keeps partial sums in the result, or in `scratch` if the result has 16 bits.
template <class S, class T>
inline Partial<T> partial_sums(const Matrix& result, Range rows, Range columns, T* scratch) {
  if constexpr (std::is_same_v<S, T>)
    return {at<S>(result, rows.begin, columns.begin), result.stride};
  else
    return {scratch, Blocking<T>::columns, Tile<T>::columns, true};
}

// A unpacked; nullptr if it must be converted, or if more rows of a tile than L1 has ways share its sets.
template <class S, class T>
inline const T* rows_in_place(const ConstMatrix& a, int64_t i) {
  const bool share_sets = a.stride * static_cast<int64_t>(sizeof(S)) % kPageBytes == 0;
  if constexpr (std::is_same_v<S, T>)
    if (Tile<T>::rows <= kWaysOfL1 || !share_sets) return at<S>(a, i, 0);
  return nullptr;
}

// B unpacked; empty if it must be converted.
template <class S, class T>
inline Panels<T> in_place(const ConstMatrix& b, int64_t k, int64_t j) {
  if constexpr (std::is_same_v<S, T>)
    return Panels<T>::in_place(at<S>(b, k, j), b.stride);
  else
    return {};
}

// B unpacked, if A has so few rows that every element of B is read once.
template <class S, class T>
inline Panels<T> in_place_if_read_once(const ConstMatrix& b, int64_t k, int64_t j, int64_t rows_of_a) {
  return rows_of_a <= Tile<T>::rows ? in_place<S, T>(b, k, j) : Panels<T>{};
}

template <class S>
inline bool is_large(int64_t rows, int64_t columns) {
  return rows * columns * static_cast<int64_t>(sizeof(S)) >= kLargeBytes;
}

// Epilogue for few sums: dispatches on the activation for every vector.
template <class S>
struct BiasAnyAct {
  using T = Accumulator<S>;
  using V = Vec<T>;
  const Forward& f;

  template <class Lanes>
  void operator()(int64_t i, int64_t j, V z, Lanes lanes) const {
    if (f.bias) z = z + load(static_cast<const S*>(f.bias) + j, lanes);
    put(i, j, z, lanes);
  }
  template <class Lanes>
  void column(int64_t i, V z, Lanes lanes) const {  // N = 1, from row i on
    if (f.bias) z = z + V(scalar(static_cast<const S*>(f.bias)));
    put(i, 0, z, lanes);
  }

 private:
  template <class Lanes>
  void put(int64_t i, int64_t j, V z, Lanes lanes) const {
    if (f.z.data) store(at<S>(f.z, i, j), z, lanes);
    const size_t index = f.activation->index;
    if (index == kReLU)
      z = ReLU{}.forward(z);
    else if (index != kIdentity)
      z = act(z);
    store(at<S>(f.y, i, j), z, lanes);
  }
  // Out of line, so that the sums' loops keep their registers.
  __attribute__((noinline)) V act(V z) const {
    with_act_in_registers(
        *f.activation, [&](auto act) { z = act.forward(z); },
        [&] {
          alignas(kVectorBytes) T sums[V::lanes];
          store(sums, z);
          pointwise_of<T>().act(*f.activation, {sums, 0}, {sums, 0}, 1, V::lanes, false);
          z = load(sums);
        });
    return z;
  }
};

template <class S, class Element = Single<Accumulator<S>>>
struct LayerOf {
  using T = Accumulator<S>;
  using V = Vec<T>;
  static constexpr bool kPairs = Element::depth == 2;
  static int64_t elements(int64_t depth) { return ceil_div(depth, Element::depth); }

  static int64_t next_block(int64_t rows) { return std::min<int64_t>(Blocking<T>::rows, rows); }
  static void read_rows(const ConstMatrix& m, int64_t i, int64_t rows, int64_t j, int64_t columns,
                        Prefetcher& prefetcher) {
    if (m.data) prefetcher.enqueue(at<S>(m, i, j), m.stride * sizeof(S), rows, columns * sizeof(S));
  }

  // y = act(x W^T + b) for few rows of x or W, where packing does not pay off: lanes run along K.
  static void forward_dots(const Forward& f, Range rows, Range columns, void*) {
    const Sizes sizes{f.M, f.K, f.N};
    if (f.M * f.K * f.N <= kFlushedMultiplyAdds)  // VDPBF16PS flushes subnormals, torch does not here
      dots<S, Single<T>>(f.x, f.w, sizes, rows, columns, BiasAnyAct<S>{f});
    else
      dots<S, Element>(f.x, f.w, sizes, rows, columns, BiasAnyAct<S>{f});
  }

  // y = act(x W^T + b)   (M,K)(K,N)
  static void forward(const Forward& f, Range rows, Range columns, void* scratch) {
    const bool x_is_large = f.K <= Blocking<T>::depth && is_large<S>(f.M, f.K);
    const auto pack_x = [&](int64_t i, int64_t count, int64_t k0, int64_t depth, bool, T* packed,
                            Prefetcher& prefetcher) {
      if (x_is_large) read_rows(f.x, rows.begin + i + count, next_block(rows.size() - i - count), 0, f.K, prefetcher);
      for (int64_t r = 0; r < count; ++r, packed += RowsOfA<T>::packed_step) {
        if constexpr (kPairs) {
          packed[depth - 1] = 0;
          std::memcpy(packed, at<S>(f.x, rows.begin + i + r, 2 * k0), 2 * std::min(2 * depth, f.K - 2 * k0));
        } else {
          for_vectors<T>(depth, [&](int64_t k, auto lanes) {
            store(packed + k, load(at<S>(f.x, rows.begin + i + r, k0 + k), lanes));
          });
        }
      }
    };
    const auto pack_w = [&](int64_t k0, int64_t depth, int64_t j, int64_t count, T* packed) {
      if constexpr (kPairs)
        pack_panels_of_pairs_transposed(f.w, k0, depth, f.K, columns.begin + j, count, packed);
      else
        pack_panels_transposed<S>(f.w, k0, depth, columns.begin + j, count, packed);
    };
    T* const begin = static_cast<T*>(scratch);
    const T* const x = f.x_in_place ? rows_in_place<S, T>(f.x, rows.begin) : nullptr;
    const auto run = [&](const auto& finish) {
      gemm<RowsOfA<T>, Element, T>(rows.size(), columns.size(), elements(f.K), pack_x, pack_w, Panels<T>{},
                                   partial_sums<S>(f.y, rows, columns, begin + kPackedA<T> + kPackedB<T>),
                                   finish.from(rows.begin, columns.begin), begin, Blocking<T>::rows, f.block_bytes, x,
                                   x ? RowsOfA<T>{f.x.stride} : RowsOfA<T>{});
    };
    const S* const bias = static_cast<const S*>(f.bias);
    S *const y = static_cast<S*>(f.y.data), *const z = static_cast<S*>(f.z.data);
    with_act_in_registers(
        *f.activation, [&](auto act) { run(BiasAct<S, decltype(act)>{bias, y, f.y.stride, f.y_past_caches}); },
        [&] { run(BiasActTile<S>{f.activation, bias, y, z, f.y.stride, f.z.stride, f.y_past_caches}); });
  }

  // dx = dz W   (M,N)(N,K), dz is computed while packing
  static void grad_input(const Backward& b, Range rows, Range columns, void* scratch) {
    const auto pack_dz = [&](int64_t i, int64_t count, int64_t n0, int64_t depth, bool, T* packed, Prefetcher&) {
      const Range block{rows.begin + i, rows.begin + i + count};
      if constexpr (kPairs) {
        alignas(kVectorBytes) T dz[2 * Blocking<T>::depth];
        for (int64_t m = block.begin; m < block.end; ++m, packed += RowsOfA<T>::packed_step) {
          const int64_t size = std::min(2 * depth, b.N - 2 * n0);
          grad_z_rows<S>(b, {m, m + 1}, {2 * n0, 2 * n0 + size}, dz, 0);
          packed[depth - 1] = 0;
          S* const rounded = reinterpret_cast<S*>(packed);
          for_vectors<T>(size, [&](int64_t n, auto lanes) { store(rounded + n, load(dz + n, lanes), lanes); });
        }
      } else {
        grad_z_rows<S>(b, block, {n0, n0 + depth}, packed, RowsOfA<T>::packed_step);
      }
    };
    const auto pack_w = [&](int64_t n0, int64_t depth, int64_t j, int64_t count, T* packed) {
      if constexpr (kPairs)
        pack_panels_of_pairs(b.w, n0, depth, b.N, columns.begin + j, count, packed);
      else
        pack_panels<S>(b.w, n0, depth, columns.begin + j, count, packed);
    };
    const StoreSums<S> finish{at<S>(b.dx, rows.begin, columns.begin), b.dx.stride, b.dx_past_caches};
    T* const begin = static_cast<T*>(scratch);
    gemm<RowsOfA<T>, Element, T>(rows.size(), columns.size(), elements(b.N), pack_dz, pack_w,
                                 in_place_if_read_once<S, T>(b.w, 0, columns.begin, rows.size()),
                                 partial_sums<S>(b.dx, rows, columns, begin + kPackedA<T> + kPackedB<T>), finish, begin,
                                 Blocking<T>::rows, b.block_bytes);
  }

  // Packs a few rows of dz as ColumnsOfA, adding them to db.
  template <int steps>
  static void pack_dz_columns(const Backward& b, int64_t n0, int64_t count, Range samples, int64_t m0, T* packed,
                              T* db) {
    constexpr int width = Tile<T>::rows, depth_step = ColumnsOfA<T>::depth_step, stride = Blocking<T>::rows;
    alignas(kVectorBytes) T dz[steps * Element::depth * stride];
    const int64_t m = samples.begin + Element::depth * m0;
    const int64_t rows = std::min<int64_t>(steps * Element::depth, samples.end - m);
    grad_z_rows<S>(b, {m, m + rows}, {n0, n0 + count}, dz, stride);
    for (int64_t r = 0; r < count; r += width, packed += ColumnsOfA<T>::panel)
      for_vectors<T>(std::min<int64_t>(width, count - r), [&](int64_t c, auto lanes) {
        V sum;
#pragma GCC unroll 4
        for (int k = 0; k < steps; ++k) {
          const T* const row = dz + Element::depth * k * stride + r + c;
          V v = load(row, lanes);
          sum = sum + v;
          if constexpr (kPairs) {
            const V next = Element::depth * k + 1 < rows ? load(row + stride, lanes) : V();
            sum = sum + next;
            v = pairs(v, next);
          }
          store(packed + k * depth_step + c, v);
        }
        store(db + r + c, load(db + r + c, lanes) + sum, lanes);
      });
  }

  // dW = dz^T x   (N,M)(M,K), dz is computed and db summed while packing
  static void grad_weight(const Backward& b, Range rows, Range columns, Range samples, void* dw, void* db,
                          void* scratch) {
    T* const begin = static_cast<T*>(scratch);
    T* const sums = columns.begin == 0 ? static_cast<T*>(db) : nullptr;
    double* const totals = reinterpret_cast<double*>(begin + kPackedA<T> + kPackedB<T>);  // of db
    if (sums) std::fill(totals, totals + rows.size(), 0.0);
    const auto pack_dz = [&](int64_t i, int64_t count, int64_t m0, int64_t depth, bool first_columns, T* packed,
                             Prefetcher&) {
      constexpr int64_t piece = kShortRows / Element::depth;
      for (int64_t k0 = 0; k0 < depth; k0 += piece) {
        alignas(kVectorBytes) T db_block[Blocking<T>::rows] = {};
        for_rows({k0, std::min(k0 + piece, depth)}, [&](auto steps, int64_t k) {
          pack_dz_columns<decltype(steps)::value>(b, rows.begin + i, count, samples, m0 + k,
                                                  packed + k * ColumnsOfA<T>::depth_step, db_block);
        });
        if (sums && first_columns) add_up(totals + i, db_block, count);
      }
    };
    if (!dw || columns.size() == 0) {  // db only
      const int64_t depth = elements(samples.size());
      Prefetcher none;
      for (int64_t k = 0; sums && k < depth; k += Blocking<T>::depth)
        for (int64_t i = 0; i < rows.size(); i += Blocking<T>::rows)
          pack_dz(i, std::min<int64_t>(Blocking<T>::rows, rows.size() - i), k,
                  std::min<int64_t>(Blocking<T>::depth, depth - k), true, begin, none);
      if (sums) round_sums(totals, rows.size(), sums + rows.begin);
      return;
    }
    const auto pack_x = [&](int64_t m0, int64_t depth, int64_t j, int64_t count, T* packed) {
      if constexpr (kPairs)
        pack_panels_of_pairs({at<S>(b.x, samples.begin, 0), b.x.stride}, m0, depth, samples.size(), columns.begin + j,
                             count, packed);
      else
        pack_panels<S>(b.x, samples.begin + m0, depth, columns.begin + j, count, packed);
    };
    const int64_t offset = rows.begin * b.K + columns.begin;
    T* const out = static_cast<T*>(dw) + offset;
    const auto run = [&](const auto& finish) {
      gemm<ColumnsOfA<T>, Element, T>(rows.size(), columns.size(), elements(samples.size()), pack_dz, pack_x,
                                      in_place_if_read_once<S, T>(b.x, samples.begin, columns.begin, rows.size()),
                                      Partial<T>{out, b.K}, finish, begin, Blocking<T>::rows, b.block_bytes);
    };
    b.update_w ? run(UpdateTile<S>{b.update_w, offset, b.K}) : run(StoreSums<T>{out, b.K});
    if (sums) round_sums(totals, rows.size(), sums + rows.begin);
    if (sums && b.update_b) update_by_parts<S>(*b.update_b, sums, 1, 0, rows);
  }

  // dz of a block of up to kColumnsOfRows columns; adds db to totals, if given.
  static constexpr int64_t kColumnsOfRows = kTallRowBytes / sizeof(T);
  static void grad_z_and_db(const Backward& b, Range rows, Range columns, T* dz, int64_t stride, double* totals) {
    alignas(kVectorBytes) T db[kColumnsOfRows] = {};
    grad_z_rows<S>(b, rows, columns, dz, stride, totals ? db : nullptr);
    if (totals) add_up(totals, db, columns.size());
  }

  // dx, dW and db in one pass over blocks of rows: dy, y and x are read once, dz stays in L2. N fits one depth block, W
  // and dW fit L2.
  static void backward_tall(const Backward& b, Range samples, void* dw, void* db, void* scratch) {
    T* const dz = static_cast<T*>(scratch);
    T* const x = dz + Blocking<T>::rows * RowsOfA<T>::packed_step;
    T* const w = x + Blocking<T>::rows * round_up_columns<T>(b.K);
    T *const dw_sums = static_cast<T*>(dw), *const db_sums = static_cast<T*>(db);
    if (b.dx.data) pack_panels<S>(b.w, 0, b.N, 0, b.K, w);
    double db_totals[kColumnsOfRows] = {};
    bool first = true;
    for (int64_t m0 = samples.begin; first || m0 < samples.end; m0 += Blocking<T>::rows, first = false) {
      const int64_t count = std::clamp<int64_t>(samples.end - m0, 0, Blocking<T>::rows);
      grad_z_and_db(b, {m0, m0 + count}, {0, b.N}, dz, RowsOfA<T>::packed_step, db_sums ? db_totals : nullptr);
      Prefetcher prefetcher;
      const int64_t next = m0 + count, next_rows = next_block(is_large<S>(b.M, b.K + b.N) ? samples.end - next : 0);
      read_rows(b.dy, next, next_rows, 0, b.N, prefetcher);
      if (b.activation->index != kIdentity) read_rows(b.saved, next, next_rows, 0, b.N, prefetcher);
      if (dw) read_rows(b.x, next, next_rows, 0, b.K, prefetcher);
      const int64_t tile_rows = (b.dx.data ? count : 0) + (dw ? b.N : 0);
      prefetcher.pace(ceil_div(tile_rows, Tile<T>::rows) * ceil_div(b.K, Tile<T>::columns));
      if (b.dx.data)
        tiles<RowsOfA<T>, Single<T>, Tile<T>::rows>(
            dz, Panels<T>::packed(w, b.N), b.N, 0, count, b.K, Stage{true, true}, Partial<T>{},
            StoreSums<S>{at<S>(b.dx, m0, 0), b.dx.stride, b.dx_past_caches}, prefetcher);
      if (!dw) continue;
      auto panels = in_place<S, T>(b.x, m0, 0);  // the block stays in L1 or L2
      if (!panels.data) {
        pack_panels<S>(b.x, m0, count, 0, b.K, x);
        panels = Panels<T>::packed(x, count);
      }
      tiles<RowsOfATransposed<T>, Single<T>, Tile<T>::rows>(dz, panels, count, 0, b.N, b.K, Stage{first, false},
                                                            Partial<T>{dw_sums, b.K}, StoreSums<T>{}, prefetcher);
    }
    if (db_sums) round_sums(db_totals, b.N, db_sums);
    end_of_streams();
  }

  static void backward_narrow(const Backward& b, Range samples, void* dw, void* db, void* scratch) {
    (NarrowBackward<S>::takes(b) ? NarrowBackward<S>::run : backward_tall)(b, samples, dw, db, scratch);
  }

  // ---- elementwise passes around a library's GEMM ----

  // Calls f(m, n, count) for pieces of rows that fit a small buffer of T.
  template <class F>
  static void for_pieces_of_rows(Range rows, int64_t N, const F& f) {
    for (int64_t m = rows.begin; m < rows.end; ++m)
      for (int64_t n = 0; n < N; n += kColumnsOfRows) f(m, n, std::min(kColumnsOfRows, N - n));
  }

  static void act(const Forward& f, const ConstMatrix& z, Range rows) {
    alignas(kVectorBytes) T sums[kColumnsOfRows];
    for_pieces_of_rows(rows, f.N, [&](int64_t m, int64_t n0, int64_t count) {
      for_vectors<T>(count, [&](int64_t n, auto lanes) { store(sums + n, load(at<S>(z, m, n0 + n), lanes), lanes); });
      pointwise_of<S>().act(*f.activation, {sums, 0}, {at<S>(f.y, m, n0), 0}, 1, count, false);
    });
  }

  static void put_grad_z(const Backward& b, Range samples, void* dz_out, void* db_out) {
    constexpr int64_t columns = 8 * kColumnsOfRows;  // totals are on the stack
    S* const dz = static_cast<S*>(dz_out);
    alignas(kVectorBytes) T rows_of_dz[4 * kColumnsOfRows];
    for (int64_t n0 = 0; n0 < b.N; n0 += columns) {
      const int64_t end = std::min(n0 + columns, b.N);
      double totals[columns] = {};
      for (int64_t m = samples.begin; m < samples.end; m += 4)
        for (int64_t n = n0; n < end; n += kColumnsOfRows) {
          const Range rows{m, std::min(m + 4, samples.end)}, some{n, std::min(n + kColumnsOfRows, end)};
          grad_z_and_db(b, rows, some, rows_of_dz, kColumnsOfRows, db_out ? totals + (n - n0) : nullptr);
          for (int64_t r = 0; dz && r < rows.size(); ++r)
            for_vectors<T>(some.size(), [&](int64_t c, auto lanes) {
              store(dz + (m + r) * b.N + n + c, load(rows_of_dz + r * kColumnsOfRows + c, lanes), lanes);
            });
        }
      if (db_out) round_sums(totals, end - n0, static_cast<T*>(db_out) + n0);
    }
  }

  static void combine(const void* parts, int64_t count, int64_t size, Range range, void* out) {
    const T* const from = static_cast<const T*>(parts) + range.begin;
    for_vectors<T>(range.size(), [&](int64_t i, auto lanes) {
      store(static_cast<S*>(out) + range.begin + i, sum_of_parts<T>(from + i, count, size, lanes), lanes);
    });
  }

  // ---- small: one thread, nothing packed but W^T ----

  // out(j, sum over i of factor(i) * row(i)[j...])
  template <class Factor, class Row, class Out>
  static void combine_rows(int64_t count, int64_t columns, const Factor& factor, const Row& row, const Out& out) {
    for_vectors<T>(columns, [&](int64_t j, auto lanes) {
      V total;
      for_row_chunks({0, count}, [&](Range piece) {
        V sum;
        for (int64_t i = piece.begin; i < piece.end; ++i) sum = sum + V(factor(i)) * load(row(i) + j, lanes);
        total = total + sum;
      });
      out(j, total, lanes);
    });
  }

  static void small_forward(const Forward& f, void* scratch) {
    T* const wt = static_cast<T*>(scratch);  // [K, N] and one row
    T* const x = wt + f.K * f.N;
    const BiasAnyAct<S> finish{f};
    for (int64_t n = 0; n < f.N; ++n)
      for (int64_t k = 0; k < f.K; ++k) wt[k * f.N + n] = scalar(at<S>(f.w, n, k));
    for (int64_t m = 0; m < f.M; ++m) {
      for_vectors<T>(f.K, [&](int64_t k, auto lanes) { store(x + k, load(at<S>(f.x, m, k), lanes), lanes); });
      combine_rows(
          f.K, f.N, [&](int64_t k) { return x[k]; }, [&](int64_t k) { return wt + k * f.N; },
          [&](int64_t n, V z, auto lanes) { finish(m, n, z, lanes); });
    }
  }

  static void small_backward(const Backward& b, void* scratch) {
    T* const dz = static_cast<T*>(scratch);  // [M, N]
    grad_z_rows<S>(b, {0, b.M}, {0, b.N}, dz, b.N);
    for (int64_t m = 0; b.dx.data && m < b.M; ++m)
      combine_rows(
          b.N, b.K, [&](int64_t n) { return dz[m * b.N + n]; }, [&](int64_t n) { return at<S>(b.w, n, 0); },
          [&](int64_t k, V v, auto lanes) { store(at<S>(b.dx, m, k), v, lanes); });
    for (int64_t n = 0; b.dw && n < b.N; ++n)
      combine_rows(
          b.M, b.K, [&](int64_t m) { return dz[m * b.N + n]; }, [&](int64_t m) { return at<S>(b.x, m, 0); },
          [&](int64_t k, V v, auto lanes) { store(static_cast<S*>(b.dw) + n * b.K + k, v, lanes); });
    if (b.db)
      combine_rows(
          b.M, b.N, [](int64_t) { return T(1); }, [&](int64_t m) { return dz + m * b.N; },
          [&](int64_t n, V v, auto lanes) { store(static_cast<S*>(b.db) + n, v, lanes); });
  }

  static constexpr LayerKernels kernels{
      small_forward, small_backward,  forward,       forward_dots,    Narrow<S>::run, grad_input,
      grad_weight,   FewRows<S>::run, backward_tall, backward_narrow, backward_k1<S>, backward_n1<S>,
      act,           put_grad_z,      combine};

 private:
  // Workspace of each path, in elements of T.
  static constexpr int64_t kPackedScratch =
      kPackedA<T> + kPackedB<T> + (std::is_same_v<S, T> ? 0 : kRowsPerPiece * Blocking<T>::columns);
  static constexpr int64_t kTallScratch = Blocking<T>::rows * (RowsOfA<T>::packed_step + kTallInputs) +  // dz, x
                                          kTallWeights + kTallRowBytes / sizeof(T) * Tile<T>::columns;   // W
  static constexpr int64_t kOneScratch = kOneBreadth * (7 + 2 * sizeof(double) / sizeof(T)) + kGradZInL1;
  static constexpr int64_t kWeightScratch = kPackedA<T> + kPackedB<T> + kBiasesPerPiece * sizeof(double) / sizeof(T);
  static_assert(sizeof(T) * std::max({kPackedScratch, kWeightScratch, kTallScratch, kOneScratch, FewRows<S>::kScratch,
                                      Narrow<S>::kScratch, NarrowBackward<S>::kScratch}) <=
                kScratchBytes);
  static_assert(kTallRowBytes <= Blocking<T>::depth * sizeof(T) && kTallInputs % Tile<T>::columns == 0);
};

}  // namespace

namespace MLP_EXT_TARGET {

const LayerKernels& layer_kernels(DType dtype) {
#if MLP_EXT_VECTOR_BYTES == 64
  if (dtype == DType::bfloat16 && multiplies_bfloat16()) return LayerOf<BFloat16, Bfloat16Pair>::kernels;
#endif
  static constexpr std::array table{&LayerOf<float>::kernels, &LayerOf<double>::kernels, &LayerOf<BFloat16>::kernels,
                                    &LayerOf<Half>::kernels};
  return *table[static_cast<size_t>(dtype)];
}

// Enough independent chains to hide the latency of FMA.
int64_t fma_loop(int64_t rounds) {
  constexpr int chains = std::min(24, 2 * kTileRows);
  Vec<float> sums[chains];
  const Vec<float> factor = 0.5f;
  for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 24
    for (int i = 0; i < chains; ++i) sums[i] = sums[i] * factor + factor;
  float total = 0;
  for (const auto& sum : sums) total += sum.v[0];
  volatile float keep = total;
  (void)keep;
  return rounds * chains * Vec<float>::lanes * 2;
}

}  // namespace MLP_EXT_TARGET
}  // namespace mlp_ext::cpu
