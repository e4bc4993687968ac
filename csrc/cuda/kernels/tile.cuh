// Products of tiles in shared memory, and what fills the tiles.
//
// A tile holds accumulators and is padded with zeros to multiples of kStep, so that products need no bounds.
#pragma once

#include "cuda/kernels/problem.cuh"

namespace mlp_ext::cuda {

constexpr int kStep = 4;  // elements read from shared memory at a time: 128 bits of float

// Elements from row to row of a tile: an odd number of steps, so that eight threads that read a step each of eight rows
// meet in no bank.
__host__ __device__ constexpr int row_stride(int64_t columns) {
  return kStep * (static_cast<int>(ceil_div(columns, kStep)) | 1);
}

// ---- operands in shared memory as one thread sees them: R rows of its own, four of depth at a time ----

// A tile [row, depth]; the thread's rows lie `step` rows apart.
template <class T>
struct AlongDepth {
  Pointer<T> data;
  int stride, step;

  template <int R>
  struct Fragment {
    Vector<T, kStep> row[R];
    __device__ void read(int d, T (&v)[R]) const {
#pragma unroll
      for (int r = 0; r < R; ++r) v[r] = row[r].at[d];
    }
  };
  template <int R>
  __device__ Fragment<R> at(int depth) const {
    Fragment<R> fragment;
#pragma unroll
    for (int r = 0; r < R; ++r) fragment.row[r] = load<kStep>(data + (r * step * stride + depth));
    return fragment;
  }
};

// A tile [depth, row]; the thread's rows are groups of four, `step` rows apart.
template <class T>
struct AcrossDepth {
  Pointer<T> data;
  int stride, step;

  template <int R>
  struct Fragment {
    Pointer<T> data;
    int stride, step;
    __device__ void read(int d, T (&v)[R]) const {
#pragma unroll
      for (int r = 0; r < R; r += kStep) {
        const auto group = load<kStep>(data + (d * stride + r / kStep * step));
#pragma unroll
        for (int i = 0; i < kStep; ++i) v[r + i] = group.at[i];
      }
    }
  };
  template <int R>
  __device__ Fragment<R> at(int depth) const {
    return {data + depth * stride, stride, step};
  }
};

// sum[p][q] += a[p] . b[q] over four of depth   (P,4)(4,Q). f(a) sees the P values of each depth.
template <int P, int Q, class T, class A, class B, class F>
__device__ void add_product(T (&sum)[P][Q], const A& a, const B& b, int depth, const F& f) {
  const auto a_fragment = a.template at<P>(depth);
  const auto b_fragment = b.template at<Q>(depth);
#pragma unroll
  for (int d = 0; d < kStep; ++d) {
    T u[P], v[Q];
    a_fragment.read(d, u);
    b_fragment.read(d, v);
    f(u);
#pragma unroll
    for (int p = 0; p < P; ++p)
#pragma unroll
      for (int q = 0; q < Q; ++q) sum[p][q] += u[p] * v[q];
  }
}
template <int P, int Q, class T, class A, class B>
__device__ void add_product(T (&sum)[P][Q], const A& a, const B& b, int depth) {
  add_product(sum, a, b, depth, [](const T(&)[P]) {});
}

// f(a) for the P values of each of four of depth.
template <int P, template <class> class Operand, class T, class F>
__device__ void for_depth(const Operand<T>& a, int depth, const F& f) {
  const auto fragment = a.template at<P>(depth);
#pragma unroll
  for (int d = 0; d < kStep; ++d) {
    T u[P];
    fragment.read(d, u);
    f(u);
  }
}

// ---- operands in global memory: elements are fetched as they are and made values later, so that loads overlap ----

template <class S>
struct Plain {  // a matrix
  Rows<const S> m;
  template <int V>
  using Raw = Vector<S, V>;
  template <int V>
  __device__ Raw<V> fetch(int64_t i, int64_t j) const {
    return load<V>(m.at(i, j));
  }
  template <int V>
  __device__ Accumulator<S> value(const Raw<V>& raw, int v) const {
    return to_accumulator(raw.at[v]);
  }
};

template <class S>
struct WithOnes {  // a matrix and, right of its columns, a column of ones: the x of which dz^T x holds db
  Rows<const S> m;
  int64_t columns;
  template <int V>
  using Raw = Vector<S, V>;
  template <int V>
  __device__ Raw<V> fetch(int64_t i, int64_t j) const {
    static_assert(V == 1);
    return j < columns ? load<V>(m.at(i, j)) : Raw<V>{{from_accumulator<S>(1)}};
  }
  template <int V>
  __device__ Accumulator<S> value(const Raw<V>& raw, int v) const {
    return to_accumulator(raw.at[v]);
  }
};

template <class S, class Act>
struct GradZ {  // dz = act'(dy, saved)
  Rows<const S> dy, saved;
  Act act;
  template <int V>
  struct Raw {
    Vector<S, V> dy, saved;
  };
  template <int V>
  __device__ Raw<V> fetch(int64_t i, int64_t j) const {
    Raw<V> raw{load<V>(dy.at(i, j)), {}};
    if (reads_saved(act, saved)) raw.saved = load<V>(saved.at(i, j));
    return raw;
  }
  template <int V>
  __device__ Accumulator<S> value(const Raw<V>& raw, int v) const {
    return act.backward(to_accumulator(raw.dy.at[v]), to_accumulator(raw.saved.at[v]));
  }
};

}  // namespace mlp_ext::cuda
