// Training steps of networks with the same layers, one network in each lane of a vector: no lane is ever empty, however
// narrow the layers. Parameters, states and gradients are interleaved for all steps of a call. Each block of rows goes
// forward, through the loss and backward before the next, as in step_by_rows-inl.h. Compiled once per instruction set.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/epilogue-inl.h"
#include "cpu/simd/pack-inl.h"
#include "cpu/simd/per_lane-inl.h"
#include "cpu/simd/products_in_lanes-inl.h"
#include "cpu/simd/row_sums-inl.h"
#include "cpu/simd/rows_in_lanes-inl.h"
#include "cpu/simd/vec-inl.h"
#include "math/losses.h"

namespace mlp_ext::cpu {
namespace {

constexpr int64_t kLaneBlockBytes = 1 << 15;  // of the outputs of a block of rows
constexpr int64_t kMostLaneRows = 32, kLeastLaneRows = 8;
static_assert(kShortRows % kMostLaneRows == 0);

template <class T>
class StepsInLanes {
  using V = Vec<T>;
  static constexpr int lanes = V::lanes;

  struct Layer {
    int64_t K, N;
    const Activation* activation;
    bool has_bias;
    T *w, *bias;        // [N, K], [N]
    T *dw, *db;         // or nullptr
    T *y, *saved, *dz;  // [block, N]; saved: y or z, for backward; dz takes the place of y, except in the top layer
  };
  struct Parameter {
    T* value;
    int64_t size;
    bool learns;
    int64_t begin;  // among the parameters that learn
  };
  struct Group {  // of neighbouring parameters with the same hyperparameters
    int64_t begin, size;
    size_t optimizer;
    std::array<bool, kMaxStates> has_state;
  };

 public:
  StepsInLanes(const LaneProblem& p, void* memory)
      : p_(p), memory_(reinterpret_cast<uintptr_t>(memory)), N_(p.layers.back().N) {
    visit(*p.loss, [&](auto loss) {
      of_rows_ = is_of_rows<decltype(loss)>;
      if constexpr (is_of_rows<decltype(loss)>) ignored_ = static_cast<int64_t>(loss.ignore_index);
    });
    const int64_t K = p.layers[0].K;
    int64_t widths = 0, widest = 0;
    for (size_t l = 0; l < p.layers.size(); ++l) {
      const LaneLayer& layer = p.layers[l];
      widths += layer.N * (keeps_z(l) ? 2 : 1);
      widest = std::max(widest, layer.N);
    }
    while (block_ > kLeastLaneRows && block_ * widths * kVectorBytes > kLaneBlockBytes) block_ /= 2;

    for (const bool learn : {true, false}) {  // those that learn are neighbours
      const int64_t size = count_learning();
      if (learn) learning_ = take<T>(size * lanes), gradients_ = take<T>(size * lanes);
      for (size_t l = 0, begin = 0; l < p.layers.size(); ++l) {
        const LaneLayer& layer = p.layers[l];
        const auto place = [&](Parameter& to, bool learns, int64_t elements) {
          if (learns != learn) return;
          to = {learns ? learning_ + begin * lanes : take<T>(elements * lanes), elements, learns, int64_t(begin)};
          begin += learns ? elements : 0;
        };
        place(parameters_[2 * l], layer.weight_learns, layer.K * layer.N);
        place(parameters_[2 * l + 1], layer.has_bias && layer.bias_learns, layer.N);
      }
      size_ = size;
    }
    const size_t states = visit(Optimizers{}, p.optimizer, [](auto o) { return o.states.size(); });
    for (size_t s = 0; s < states; ++s) states_[s] = take<T>(size_ * lanes);
    if (std::min(p.batch, p.rows) > kShortRows) totals_ = take<double>(size_ * lanes);
    optimizers_ = take<LaneOptimizer<T>>(2 * p.layers.size());
    counts_ = take<PerLane<T>>(2 * p.layers.size());

    for (size_t l = 0; l < p.layers.size(); ++l) {
      const LaneLayer& layer = p.layers[l];
      const Parameter &w = parameters_[2 * l], &bias = parameters_[2 * l + 1];
      const auto gradient = [&](const Parameter& of) { return of.learns ? gradients_ + of.begin * lanes : nullptr; };
      T* const y = take<T>(block_ * layer.N * lanes);
      T* const z = keeps_z(l) ? take<T>(block_ * layer.N * lanes) : y;
      T* const dz = l + 1 == p.layers.size() ? take<T>(block_ * layer.N * lanes) : y;
      layers_[l] = {
          layer.K, layer.N, layer.activation, layer.has_bias, w.value, bias.value, gradient(w), gradient(bias), y,
          z,       dz};
    }
    x_block_ = take<T>(block_ * K * lanes);
    spare_ = take<T>(block_ * widest * lanes);
    if (p.loss_weight) loss_weight_ = take<T>(N_ * lanes);
  }
  size_t bytes() const { return used_; }

  void train(std::span<LaneNetwork> networks) {
    networks_ = networks;
    used_lanes_ = static_cast<int>(networks.size());
    read_networks();
    const int64_t batches = ceil_div(p_.rows, p_.batch);
    int64_t done = 0;
    for (int64_t epoch = 0; epoch < p_.epochs; ++epoch)
      for (int64_t i = 0; i < batches; ++i, ++done) {
        step(epoch * p_.rows, i * p_.batch, std::min(p_.batch, p_.rows - i * p_.batch), done,
             epoch * p_.losses_per_epoch + i);
        if (learning_lanes_ == 0) return write_networks();
      }
    for (int l = 0; l < used_lanes_; ++l)
      if (learns_.v[l] != 0) networks_[l].done = done;
    write_networks();
  }

 private:
  template <class U>
  U* take(int64_t count) {
    U* const at = reinterpret_cast<U*>(memory_ + used_);
    used_ += (static_cast<size_t>(count) * sizeof(U) + 63) / 64 * 64;
    return at;
  }
  bool keeps_z(size_t l) const { return l >= p_.lowest && needs_z(*p_.layers[l].activation); }
  int64_t count_learning() const {
    int64_t size = 0;
    for (const LaneLayer& l : p_.layers)
      size += (l.weight_learns ? l.K * l.N : 0) + (l.has_bias && l.bias_learns ? l.N : 0);
    return size;
  }

  // Lanes without a network repeat the first one.
  const LaneNetwork& network(int lane) const { return networks_[lane < used_lanes_ ? lane : 0]; }
  template <class F>
  static auto for_lanes(const F& f) {
    std::array<std::decay_t<decltype(f(0))>, lanes> all;
    for (int l = 0; l < lanes; ++l) all[l] = f(l);
    return all;
  }

  void read_networks() {
    learns_ = V();
    for (int l = 0; l < used_lanes_; ++l) learns_.v[l] = 1;
    learning_lanes_ = used_lanes_;
    const size_t hyperparameters = visit(Optimizers{}, p_.optimizer, [](auto o) { return o.parameters.size(); });
    const auto parameter = [&](int lane, size_t i) -> const LaneParameter& { return network(lane).parameters[i]; };
    const auto same = [&](size_t a, size_t b) {
      for (int l = 0; l < used_lanes_; ++l) {
        const LaneParameter &pa = parameter(l, a), &pb = parameter(l, b);
        if (pa.count != pb.count || std::memcmp(pa.hyperparameters, pb.hyperparameters, 8 * hyperparameters) != 0)
          return false;
      }
      return true;
    };
    const size_t count = 2 * p_.layers.size();
    size_t first[2 * kMostLayers], optimizers = 0;  // the first parameter of each optimizer
    groups_count_ = 0;
    for (size_t i = 0; i < count; ++i) {
      const Parameter& p = parameters_[i];
      if (p.size == 0 || (i % 2 && !p_.layers[i / 2].has_bias)) continue;
      const auto read = [&](const auto& of, T* to) {
        gather<T>(for_lanes([&](int l) { return static_cast<const T*>(of(parameter(l, i))); }).data(), p.size, to);
      };
      read([](const LaneParameter& lp) { return lp.value; }, p.value);
      if (!p.learns) continue;
      std::array<bool, kMaxStates> has_state;
      for (size_t s = 0; s < kMaxStates; ++s) {
        has_state[s] = parameter(0, i).states[s] != nullptr;
        if (has_state[s]) read([&](const LaneParameter& lp) { return lp.states[s]; }, states_[s] + p.begin * lanes);
      }
      size_t o = 0;
      while (o < optimizers && !same(i, first[o])) ++o;
      if (o == optimizers) {
        first[optimizers++] = i;
        new (&optimizers_[o]) LaneOptimizer<T>(
            lane_optimizer<T>(p_.optimizer, for_lanes([&](int l) { return parameter(l, i).hyperparameters; })));
        new (&counts_[o]) PerLane<T>(PerLane<T>::of([&](int l) { return parameter(l, i).count; }));
      }
      if (groups_count_ && groups_[groups_count_ - 1].optimizer == o)
        groups_[groups_count_ - 1].size += p.size;
      else
        groups_[groups_count_++] = {p.begin, p.size, o, has_state};
    }
    for (size_t l = 0; l < p_.layers.size(); ++l)
      if (!layers_[l].has_bias) std::fill(layers_[l].bias, layers_[l].bias + layers_[l].N * lanes, T(0));
    optimizers_count_ = optimizers;
    if (loss_weight_)
      for (int64_t n = 0; n < N_; ++n) store(loss_weight_ + n * lanes, V(static_cast<const T*>(p_.loss_weight)[n]));
  }

  void write_networks() {
    for (size_t i = 0; i < 2 * p_.layers.size(); ++i) {
      const Parameter& p = parameters_[i];
      if (!p.learns) continue;
      const auto write = [&](const T* from, const auto& of) {
        scatter(from, p.size, for_lanes([&](int l) { return static_cast<T*>(of(network(l).parameters[i])); }).data(),
                used_lanes_);
      };
      write(p.value, [](const LaneParameter& lp) { return lp.value; });
      for (size_t s = 0; s < kMaxStates; ++s)
        if (network(0).parameters[i].states[s])
          write(states_[s] + p.begin * lanes, [&](const LaneParameter& lp) { return lp.states[s]; });
    }
  }

  // ---- rows of the input and the target ----

  // The input row of row m of this epoch.
  int64_t row(const LaneNetwork& of, int64_t m) const { return of.order ? of.order[epoch_ + m] : m; }

  // Rows [m, m + count) of a matrix [input rows, width] of each network, interleaved.
  void gather_rows(ConstMatrix LaneNetwork::* matrix, int64_t width, int64_t m, int64_t count, T* to) const {
    bool contiguous = true;
    for (int l = 0; l < used_lanes_; ++l)
      contiguous = contiguous && !network(l).order && (network(l).*matrix).stride == width;
    const int64_t rows = contiguous ? 1 : count, elements = contiguous ? count * width : width;
    for (int64_t r = 0; r < rows; ++r)
      gather<T>(for_lanes([&](int l) { return at<T>(network(l).*matrix, row(network(l), m + r), 0); }).data(), elements,
                to + r * width * lanes);
  }
  // The same for one network: in place, or copied to `to`.
  ConstMatrix rows_of(const LaneNetwork& of, ConstMatrix LaneNetwork::* matrix, int64_t width, int64_t m, int64_t count,
                      T* to) const {
    const ConstMatrix& rows = of.*matrix;
    if (!of.order) return {at<T>(rows, m, 0), rows.stride};
    for (int64_t r = 0; r < count; ++r) {
      const T* const from = at<T>(rows, row(of, m + r), 0);
      for_vectors<T>(width, [&](int64_t k, auto n) { store(to + r * width + k, load(from + k, n), n); });
    }
    return {to, width};
  }

  void read_x(int64_t m, int64_t count) {
    const int64_t K = layers_[0].K;
    if (p_.same_x && p_.same_order) {
      x_ = rows_of(network(0), &LaneNetwork::x, K, m, count, x_block_);
    } else {
      gather_rows(&LaneNetwork::x, K, m, count, x_block_);
      x_ = {x_block_, K};
    }
  }
  // f<operand>(data, stride) for the input of layer l
  template <class F>
  void with_input(size_t l, const F& f) const {
    if (l > 0) return f.template operator()<Each<T>>(layers_[l - 1].y, layers_[l].K);
    const T* const x = static_cast<const T*>(x_.data);
    if (p_.same_x && p_.same_order) return f.template operator()<Same<T>>(x, x_.stride);
    f.template operator()<Each<T>>(x, x_.stride);
  }

  // ---- a step ----

  // One step on rows [begin, begin + M) of the epoch whose order starts at `epoch`; stores each network's loss at index
  // `at`.
  void step(int64_t epoch, int64_t begin, int64_t M, int64_t done, int64_t at) {
    epoch_ = epoch;
    totals_of_losses_.fill(0);
    valid_.fill(true);
    set_scales(begin, M);
    for (int64_t m = 0; m < M; m += block_) {
      const int64_t count = std::min(block_, M - m);
      const bool adds = m % kShortRows != 0;
      forward(begin + m, count);
      loss(begin + m, count);
      backward(count, adds);
      if (M > kShortRows && (m + count == M || (m + count) % kShortRows == 0))
        add_to_totals(m + count <= kShortRows, m + count == M);
    }
    for (int l = 0; l < used_lanes_; ++l) {
      if (learns_.v[l] == 0) continue;
      if (valid_[l]) {
        static_cast<T*>(networks_[l].losses)[at] = static_cast<T>(totals_of_losses_[l] * scales_[l]);
      } else {
        learns_.v[l] = 0;
        --learning_lanes_;
        networks_[l].done = done;
      }
    }
    if (learning_lanes_ > 0) update_parameters(done);
  }

  void forward(int64_t m, int64_t count) {
    read_x(m, count);
    for (size_t l = 0; l < p_.layers.size(); ++l) {
      const Layer& layer = layers_[l];
      with_input(l, [&]<class X>(const T* x, int64_t stride) {
        const AddBias<T> finish{layer.bias, {layer.saved, layer.N}, layer.activation->index == kReLU};
        lane_product(X{x, stride, 1}, Each<T>{layer.w, layer.K, 1}, count, layer.N, layer.K, finish);
      });
      if (layer.activation->index != kIdentity && layer.activation->index != kReLU)
        pointwise_of<T>().act(*layer.activation, {layer.saved, 0}, {layer.y, 0}, 1, count * layer.N * lanes, false);
    }
  }

  // dz of the top layer
  void loss(int64_t m, int64_t count) {
    const Layer& top = layers_[p_.layers.size() - 1];
    const bool of_classes = network(0).classes != nullptr;
    of_classes ? read_classes(m, count) : read_target(m, count);
    const Loss loss{p_.loss, 1, {spare_, N_}, nullptr, 1, loss_weight_};
    pointwise_of<T>().loss_in_lanes(loss, of_classes, count, N_, top.y, top.dz, scales_.data(),
                                    totals_of_losses_.data(), valid_.data());
    if (top.activation->index != kIdentity)
      pointwise_of<T>().grad_z(*top.activation, {top.dz, 0}, {top.saved, 0}, {top.dz, 0}, nullptr, 1,
                               count * N_ * lanes);
  }
  void read_target(int64_t m, int64_t count) {
    if (!p_.same_target || !p_.same_order) return gather_rows(&LaneNetwork::target, N_, m, count, spare_);
    for (int64_t r = 0; r < count; ++r) {
      const T* const from = at<T>(network(0).target, row(network(0), m + r), 0);
      for (int64_t n = 0; n < N_; ++n) store(spare_ + (r * N_ + n) * lanes, V(from[n]));
    }
  }
  void read_classes(int64_t m, int64_t count) {  // as numbers of T, -1 where they are ignored
    const auto number = [&](int l, int64_t r) {
      const int64_t c = class_of(network(l), m + r);
      return c == ignored_ ? T(-1) : static_cast<T>(c);
    };
    for (int64_t r = 0; r < count; ++r)
      if (p_.same_target && p_.same_order)
        store(spare_ + r * lanes, V(number(0, r)));
      else
        for (int l = 0; l < lanes; ++l) spare_[r * lanes + l] = number(l, r);
  }
  int64_t class_of(const LaneNetwork& of, int64_t m) const { return of.classes[row(of, m) * of.classes_stride]; }

  // A mean divides by the number of elements or rows, or the sum of class weights.
  void set_scales(int64_t begin, int64_t M) {
    if (!p_.mean) return scales_.fill(1);
    if (!network(0).classes) return scales_.fill(1 / static_cast<double>(of_rows_ ? M : M * N_));
    const T* const weight = static_cast<const T*>(p_.loss_weight);
    for (int l = 0; l < lanes; ++l) {
      if (l > 0 && p_.same_target && p_.same_order) {
        scales_[l] = scales_[0];
        continue;
      }
      double total = 0;
      for (int64_t m = begin; m < begin + M; ++m) {
        const int64_t c = class_of(network(l), m);
        if (c != ignored_) total += weight ? static_cast<double>(weight[c]) : 1;
      }
      scales_[l] = 1 / total;
    }
  }

  void backward(int64_t count, bool adds) {
    static constexpr T one = 1;
    for (size_t l = p_.layers.size(); l-- > p_.lowest;) {
      const Layer& layer = layers_[l];
      const T* const dz = layer.dz;
      if (layer.dw)  // dW = dz^T x
        with_input(l, [&]<class X>(const T* x, int64_t stride) {
          const AddGradients<T> finish{{layer.dw, layer.K}, adds};
          lane_product(X{x, 1, stride}, Each<T>{dz, 1, layer.N}, layer.K, layer.N, count, finish);
        });
      if (layer.db)
        lane_product(Same<T>{&one, 0, 0}, Each<T>{dz, 1, layer.N}, 1, layer.N, count,
                     AddGradients<T>{{layer.db, 1}, adds});
      if (l == p_.lowest) break;
      // dx = dz W
      const Layer& below = layers_[l - 1];
      bool in_registers = true;
      with_act_in_registers(*below.activation, [](auto) {}, [&] { in_registers = false; });
      const GradZ<T, false> finish{
          below.activation, {below.saved, below.N}, {in_registers ? below.dz : spare_, below.N}};
      lane_product(Each<T>{dz, layer.N, 1}, Each<T>{layer.w, 1, layer.K}, count, layer.K, layer.N, finish);
      if (!in_registers)
        pointwise_of<T>().grad_z(*below.activation, {spare_, 0}, {below.saved, 0}, {below.dz, 0}, nullptr, 1,
                                 count * below.N * lanes);
    }
  }

  // Sums of more than kShortRows rows add such chunks in double.
  void add_to_totals(bool first, bool last) {
    const int64_t size = size_ * lanes;
    if (first)
      for (int64_t i = 0; i < size; ++i) totals_[i] = static_cast<double>(gradients_[i]);
    else if (!last)
      add_up(totals_, gradients_, size);
    else
      for (int64_t i = 0; i < size; ++i)
        gradients_[i] = static_cast<T>(totals_[i] + static_cast<double>(gradients_[i]));
  }

  void update_parameters(int64_t done) {
    for (size_t o = 0; o < optimizers_count_; ++o)
      begin_step(optimizers_[o], counts_[o] + static_cast<double>(done + 1));
    for (size_t g = 0; g < groups_count_; ++g) {
      const Group& group = groups_[g];
      const int64_t begin = group.begin * lanes;
      LaneUpdate<T> u{learning_ + begin, {}, gradients_ + begin, group.size};
      for (size_t s = 0; s < kMaxStates; ++s) u.states[s] = group.has_state[s] ? states_[s] + begin : nullptr;
      if (learning_lanes_ == used_lanes_)
        update(optimizers_[group.optimizer], u);
      else
        update_some(optimizers_[group.optimizer], u, V(0) < learns_);
    }
  }

  const LaneProblem& p_;
  const uintptr_t memory_;
  size_t used_ = 0;
  const int64_t N_;
  bool of_rows_ = false;  // whether the loss is
  int64_t ignored_ = -1;  // class
  int64_t block_ = kMostLaneRows;
  std::array<Layer, kMostLayers> layers_;
  std::array<Parameter, 2 * kMostLayers> parameters_{};
  std::array<Group, 2 * kMostLayers> groups_;
  size_t groups_count_ = 0, optimizers_count_ = 0;
  LaneOptimizer<T>* optimizers_;
  PerLane<T>* counts_;
  int64_t size_ = 0;            // of the parameters that learn
  T *learning_, *gradients_;    // [size]
  T* states_[kMaxStates] = {};  // [size]
  double* totals_ = nullptr;    // [size]
  T* x_block_;                  // [block, K]
  T* spare_;                    // [block, widest layer]: the target, then dy
  T* loss_weight_ = nullptr;

  std::span<LaneNetwork> networks_;
  int used_lanes_ = 0, learning_lanes_ = 0;
  V learns_;  // 1 or 0
  int64_t epoch_ = 0;
  ConstMatrix x_{};
  std::array<double, lanes> scales_, totals_of_losses_;
  std::array<bool, lanes> valid_;
};

template <class T>
constexpr LaneKernels kLaneKernels{[]() -> int64_t { return Vec<T>::lanes; },
                                   [](const LaneProblem& p) { return StepsInLanes<T>(p, nullptr).bytes(); },
                                   [](const LaneProblem& p, std::span<LaneNetwork> networks, void* scratch) {
                                     StepsInLanes<T>(p, scratch).train(networks);
                                   },
                                   [](const StepProblem& p) { return RowsInLanes<T>(p, nullptr).bytes(); },
                                   [](const StepProblem& p, Range rows, void* sums, void* scratch, bool& valid) {
                                     return RowsInLanes<T>(p, scratch).run(rows, static_cast<T*>(sums), valid);
                                   }};

}  // namespace

namespace MLP_EXT_TARGET {

const LaneKernels* lane_kernels(DType dtype) {
  if (dtype == DType::float32) return &kLaneKernels<float>;
  if (dtype == DType::float64) return &kLaneKernels<double>;
  return nullptr;
}

}  // namespace MLP_EXT_TARGET
}  // namespace mlp_ext::cpu
