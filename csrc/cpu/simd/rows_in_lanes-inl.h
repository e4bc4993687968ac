// A step of one narrow network, with one row of the batch in each lane of a vector. Weights are read in place, the same
// for all lanes; gradients are a number for each lane, summed over the lanes at the end.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/epilogue-inl.h"
#include "cpu/simd/per_lane-inl.h"
#include "cpu/simd/products_in_lanes-inl.h"
#include "cpu/simd/row_sums-inl.h"

namespace mlp_ext::cpu {
namespace {

// Sums over the lanes of each of `count` vectors. As transpose(), but for each bit of the lane number the blocks that
// meet are added, so that half as many vectors are left.
template <class T>
void sum_over_lanes(const T* vectors, int64_t count, T* sums) {
  constexpr int lanes = Vec<T>::lanes;
  for_vectors<T>(count, [&](int64_t i, auto n) {
    Vec<T> rows[lanes];
    for (int64_t j = 0; j < std::min<int64_t>(lanes, count - i); ++j) rows[j] = load(vectors + (i + j) * lanes);
#pragma GCC unroll 4
    for (int bit = 1; bit < lanes; bit *= 2) {
      typename Vec<T>::Bits low{}, high{};
#pragma GCC unroll 16
      for (int l = 0; l < lanes; ++l) {
        low[l] = l & bit ? lanes + l - bit : l;
        high[l] = l & bit ? lanes + l : l + bit;
      }
#pragma GCC unroll 16
      for (int r = 0; r < lanes; r += 2 * bit) {
        const auto a = rows[r].v, b = rows[r + bit].v;
        rows[r].v = shuffle(a, b, low) + shuffle(a, b, high);
      }
    }
    store(sums + i, rows[0], n);
  });
}

template <class T>
class RowsInLanes {
  using V = Vec<T>;
  static constexpr int lanes = V::lanes;
  static constexpr int64_t kGroups = 8;                     // vectors of rows in a block
  static constexpr int64_t kShortSum = kShortRows * lanes;  // rows

 public:
  RowsInLanes(const StepProblem& p, void* memory) : p_(p), memory_(reinterpret_cast<uintptr_t>(memory)) {
    const int64_t N = p.layers.back().N;
    widest_ = p.layers[0].K;
    for (size_t l = 0; l < p.layers.size(); ++l) {
      const StepLayerView& layer = p.layers[l];
      y_[l] = take(kGroups * layer.N * lanes);
      saved_[l] = needs_z(*layer.activation) ? take(kGroups * layer.N * lanes) : y_[l];
      dz_[l] = l + 1 == p.layers.size() ? take(kGroups * N * lanes) : y_[l];
      widest_ = std::max(widest_, layer.N);
    }
    x_ = take(kGroups * p.layers[0].K * lanes);
    spare_ = take(kGroups * widest_ * lanes);
    zeros_ = take(widest_);
    weight_ = take(N * lanes);  // whatever the loss, which bytes() is not told
    gradients_ = take(p.sums * lanes);
    totals_ = reinterpret_cast<double*>(take(p.sums * static_cast<int64_t>(sizeof(double) / sizeof(T))));
  }
  size_t bytes() const { return used_; }

  // As StepRows::run.
  double run(Range rows, T* sums, bool& valid) {
    std::fill(zeros_, zeros_ + widest_, T(0));
    if (p_.loss.weight)
      for (int64_t n = 0; n < p_.layers.back().N; ++n)
        store(weight_ + n * lanes, V(static_cast<const T*>(p_.loss.weight)[n]));
    std::fill(totals_, totals_ + (rows.size() > kShortSum ? p_.sums : 0), 0.0);
    double loss = 0;
    for (int64_t begin = rows.begin; begin < rows.end; begin += kShortSum) {
      const int64_t end = std::min(begin + kShortSum, rows.end);
      for (int64_t m = begin; m < end; m += kGroups * lanes)
        loss += block({m, std::min(m + kGroups * lanes, end)}, m > begin, valid);
      sum_over_lanes(gradients_, p_.sums, sums);
      if (rows.size() > kShortSum) add_up(totals_, sums, p_.sums);
    }
    if (rows.size() > kShortSum) round_sums(totals_, p_.sums, sums);
    if (rows.size() == 0) std::fill(sums, sums + p_.sums, T(0));
    return loss;
  }

 private:
  T* take(int64_t count) {
    T* const at = reinterpret_cast<T*>(memory_ + used_);
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return at;
  }

  // Rows [begin, begin + lanes) in lanes; lanes from `end` on repeat the last row, since 0 could make a NaN.
  void gather_rows(const ConstMatrix& matrix, int64_t width, int64_t begin, int64_t end, T* to) const {
    const T* rows[lanes];
    for (int64_t l = 0; l < lanes; ++l) rows[l] = at<T>(matrix, std::min(begin + l, end - 1), 0);
    gather(rows, width, to);
  }

  double block(Range rows, bool adds, bool& valid) {
    const int64_t groups = ceil_div(rows.size(), int64_t(lanes)), K = p_.layers[0].K;
    for (int64_t g = 0; g < groups; ++g) gather_rows(p_.x, K, rows.begin + g * lanes, rows.end, x_ + g * K * lanes);
    forward(groups);
    double total = 0;
    for (int64_t g = 0; g < groups; ++g) total += loss(g, rows.begin + g * lanes, rows.end, valid);
    backward(groups, adds);
    return total;
  }

  const T* input(size_t l) const { return l > 0 ? y_[l - 1] : x_; }

  void forward(int64_t groups) {
    for (size_t l = 0; l < p_.layers.size(); ++l) {
      const StepLayerView& layer = p_.layers[l];
      const size_t act = layer.activation->index;
      const AddBiasOfRows<T> finish{
          layer.bias ? static_cast<const T*>(layer.bias) : zeros_, {saved_[l], layer.N}, act == kReLU};
      lane_product(Same<T>{static_cast<const T*>(layer.w.data), layer.w.stride, 1}, Each<T>{input(l), layer.K, 1},
                   layer.N, groups, layer.K, finish);
      if (act != kIdentity && act != kReLU)
        pointwise_of<T>().act(*layer.activation, {saved_[l], 0}, {y_[l], 0}, 1, groups * layer.N * lanes, false);
    }
  }

  // The loss of a group of rows, and dz of the top layer: 0 in lanes without a row.
  double loss(int64_t g, int64_t begin, int64_t end, bool& valid) {
    const size_t top = p_.layers.size() - 1;
    const int64_t N = p_.layers[top].N, first = g * N * lanes, used = std::min<int64_t>(lanes, end - begin);
    const Loss& given = p_.loss;
    if (given.classes)
      for (int64_t l = 0; l < lanes; ++l) {
        const int64_t c = given.classes[std::min(begin + l, end - 1) * given.classes_stride];
        spare_[l] = c == given.ignore_index ? T(-1) : static_cast<T>(c);
      }
    else
      gather_rows(given.target, N, begin, end, spare_);
    const Loss in_lanes{given.function, 1, {spare_, N}, nullptr, 1, given.weight ? weight_ : nullptr};
    std::array<double, lanes> scales, totals{};
    std::array<bool, lanes> all_valid;
    scales.fill(given.scale), all_valid.fill(true);
    T* const dz = dz_[top] + first;
    pointwise_of<T>().loss_in_lanes(in_lanes, given.classes != nullptr, 1, N, y_[top] + first, dz, scales.data(),
                                    totals.data(), all_valid.data());
    if (p_.layers[top].activation->index != kIdentity)
      pointwise_of<T>().grad_z(*p_.layers[top].activation, {dz, 0}, {saved_[top] + first, 0}, {dz, 0}, nullptr, 1,
                               N * lanes);
    double total = 0;
    for (int64_t l = 0; l < used; ++l) total += totals[l], valid = valid && all_valid[l];
    for (int64_t n = 0; used < lanes && n < N; ++n) std::fill(dz + n * lanes + used, dz + (n + 1) * lanes, T(0));
    return total;
  }

  void backward(int64_t groups, bool adds) {
    static constexpr T one = 1;
    for (size_t l = p_.layers.size(); l-- > p_.lowest;) {
      const StepLayerView& layer = p_.layers[l];
      const Each<T> dz_by_columns{dz_[l], 1, layer.N};
      if (layer.dw >= 0)
        lane_product(Each<T>{input(l), 1, layer.K}, dz_by_columns, layer.K, layer.N, groups,
                     AddGradients<T>{{gradients_ + layer.dw * lanes, layer.K}, adds});
      if (layer.db >= 0)
        lane_product(Same<T>{&one, 0, 0}, dz_by_columns, 1, layer.N, groups,
                     AddGradients<T>{{gradients_ + layer.db * lanes, 1}, adds});
      if (l == p_.lowest) break;
      const Activation& below = *p_.layers[l - 1].activation;
      bool in_registers = true;
      with_act_in_registers(below, [](auto) {}, [&] { in_registers = false; });
      const GradZ<T, true> finish{&below, {saved_[l - 1], layer.K}, {in_registers ? dz_[l - 1] : spare_, layer.K}};
      lane_product(Same<T>{static_cast<const T*>(layer.w.data), 1, layer.w.stride}, Each<T>{dz_[l], layer.N, 1},
                   layer.K, groups, layer.N, finish);
      if (!in_registers)
        pointwise_of<T>().grad_z(below, {spare_, 0}, {saved_[l - 1], 0}, {dz_[l - 1], 0}, nullptr, 1,
                                 groups * layer.K * lanes);
    }
  }

  const StepProblem& p_;
  const uintptr_t memory_;
  size_t used_ = 0;
  T *y_[kMostLayers], *saved_[kMostLayers], *dz_[kMostLayers];
  T *x_, *spare_, *zeros_, *weight_, *gradients_;
  double* totals_;
  int64_t widest_;
};

}  // namespace
}  // namespace mlp_ext::cpu
