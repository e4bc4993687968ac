// Losses, updates and training steps by blocks of rows and by panels, beside plain loops in double.
#include "arrays.h"
#include "cases.h"

namespace mlp_ext::cpu {
namespace {

// ---- losses ----

// What a loss compares outputs [M, N] with, as the kernels and as plain loops take it.
template <class S>
struct Target {
  LossFunction function;
  Array<S> target, weight;
  std::vector<int64_t> classes;
  bool weighted;
  double scale;

  Target(Random& random, const LossCase& c, int64_t M, int64_t N)
      : function(choose(Losses{}, index_of(c.name, Losses{}), c.numbers)),
        target(random, M, N, 2, 0.1, 0.9),
        weight(random, 1, N, 0, 0.5, 1.5),
        weighted(c.weighted),
        scale(1.0 / static_cast<double>(std::max<int64_t>(1, M * N))) {
    for (int64_t m = 0; c.of_classes && m < M; ++m) classes.insert(classes.end(), {(m * 7 + 1) % N, -9});
  }
  Loss loss() {
    Loss l{&function, scale, target.in()};
    if (!classes.empty()) l.classes = classes.data(), l.classes_stride = 2;
    if (weighted) l.weight = weight.data();
    l.ignore_index = ignore_index_of(function);
    return l;
  }

  struct Row {
    const Target& of;
    int64_t m, N;
    const double* outputs;
    double* gradients;
    int64_t c() const { return of.classes.empty() ? -1 : of.classes[2 * m]; }
    double z(int64_t n) const { return outputs[n]; }
    double t(int64_t n) const { return of.target(m, n); }
    double w(int64_t n) const { return of.weighted ? of.weight(0, n) : 1; }
    double exp(int64_t n, double most) const { return std::exp(z(n) - most); }
    double sum_exp(double most) const {
      double sum = 0;
      for (int64_t n = 0; n < N; ++n) sum += exp(n, most);
      return sum;
    }
    void put(int64_t n, double v) const { gradients[n] = v; }
  };
  // The sum of the losses of y, and dy.
  double plain(const Exact& y, Exact& dy) const {
    double total = 0;
    for (int64_t m = 0; m < y.rows; ++m) {
      const Row row{*this, m, y.columns, &y.values[m * y.columns], &dy.values[m * y.columns]};
      total += visit(function, [&](auto l) {
        double sum = 0;
        if constexpr (is_of_rows<decltype(l)>) {
          if (row.c() >= 0 && row.c() == ignore_index_of(function))
            std::fill(row.gradients, row.gradients + y.columns, 0.0);
          else
            sum = l.template row<double>(row, y.columns, scale);
        } else {
          for (int64_t n = 0; n < y.columns; ++n) {
            sum += l.forward(row.z(n), row.t(n), row.w(n));
            row.put(n, l.backward(row.z(n), row.t(n), row.w(n), scale));
          }
        }
        return sum;
      });
    }
    return total;
  }
};

void compare_loss(Report& report, double found, double exact, double epsilon) {
  report.check(std::abs(found - exact) <= epsilon * (1 + std::abs(exact)), "loss",
               "is " + std::to_string(found) + ", not " + std::to_string(exact));
}

template <class S>
void test_losses(Report& report) {
  using T = Accumulator<S>;
  const StepKernels& kernels = TARGET::step_kernels(Format<S>::dtype);
  Random random;
  for (const LossCase& c : kLosses)
    for (const auto& [M, N] :
         {std::pair<int64_t, int64_t>{0, 3}, {1, 1}, {1, 5}, {19, 7}, {33, 2}, {150, 1}, {9, 70}}) {
      report.subject = std::string(Format<S>::name) + " " + c.name + (c.weighted ? ", weighted " : " ") +
                       std::to_string(M) + "x" + std::to_string(N);
      Target<S> target(random, c, M, N);
      const bool probabilities = c.name == std::string("bce");
      Array<S> y(random, M, N, 0, probabilities ? 0.05 : -3, probabilities ? 0.95 : 3), dy(M, N);
      const Exact outputs = exactly(y);
      Exact exact{M, N};
      const double total = target.plain(outputs, exact);
      exact.terms = 2 * target.scale;  // of terms that may cancel
      Scratch scratch((3 * kLossRows + 1) * N * sizeof(T));
      bool valid = true;
      const double found = kernels.loss(target.loss(), {0, M}, N, y.data(), dy.data(), scratch.data(), valid);
      compare_loss(report, found, total, 32 * epsilon<T>);
      report.compare(dy, exact, "dy");
      report.check(valid, "probabilities", "are refused");
      report.check(scratch.is_kept(), "loss", "needs more scratch than planned");
      if (!probabilities || M == 0) continue;
      y.fill([&](int64_t m, int64_t n) { return m == M - 1 && n == N - 1 ? 1.5 : 0.5; });
      kernels.loss(target.loss(), {0, M}, N, y.data(), dy.data(), scratch.data(), valid);
      report.check(!valid, "1.5", "is taken for a probability");
    }
}

// ---- updates ----

Optimizer optimizer_of(const OptimizerCase& c) {
  return at_step(choose(Optimizers{}, index_of(c.name, Optimizers{}), c.numbers), 3);
}

// A parameter with states, and what they become.
template <class S>
struct Learning {
  const Optimizer optimizer;
  std::vector<Array<S>> arrays;  // the parameter, its states
  std::vector<Exact> exact;
  Update update;

  Learning(Random& random, const OptimizerCase& c, int64_t size) : optimizer(optimizer_of(c)) {
    arrays.reserve(1 + kMaxStates);
    for (size_t s = 0; s <= kMaxStates; ++s)
      arrays.emplace_back(random, 1, size, 0, s ? 0.3 : -1, s ? 0.5 : 1);  // square_avg > grad_avg^2
    for (const auto& a : arrays) exact.push_back(exactly(a));
    update = {arrays[0].data(), {}, &optimizer};
    visit(optimizer, [&](auto o) {
      for (size_t s = 0; s < o.states.size(); ++s)
        if (o.has_state(s)) update.states[s] = arrays[1 + s].data();
    });
  }
  void plain(const Exact& gradient, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double states[kMaxStates];
      for (size_t s = 0; s < kMaxStates; ++s) states[s] = exact[1 + s].values[i];
      visit(optimizer, [&](auto o) { o.update(exact[0].values[i], states, gradient.values[i]); });
      for (size_t s = 0; s < kMaxStates; ++s)
        if (update.states[s]) exact[1 + s].values[i] = states[s];
    }
  }
  void compare(Report& report, const char* what, double times = 1) {
    for (size_t s = 0; s < arrays.size(); ++s) {
      exact[s].terms = exact[s].largest();
      report.compare(arrays[s], exact[s], what, times);
    }
  }
};

template <class S>
void test_updates(Report& report) {
  using T = Accumulator<S>;
  const StepKernels& kernels = TARGET::step_kernels(Format<S>::dtype);
  Random random;
  for (const OptimizerCase& c : kOptimizers)
    for (const int64_t size : {1, 7, 29, 1100})
      for (const int64_t count : {1, 3}) {
        report.subject = std::string(Format<S>::name) + " " + c.name + " of " + std::to_string(size);
        const int64_t stride = size + 5, begin = size / 3, end = size - size / 5;
        Array<T> parts(random, count, size, 5);
        Array<S> rounded(1, size, 5);
        Exact sums{1, size}, rounded_sums{1, size};
        for (int64_t i = 0; i < size; ++i)
          for (int64_t p = 0; p < count; ++p) sums.values[i] += parts(p, i);
        rounded.fill([&](int64_t, int64_t i) { return sums.values[i]; });
        for (int64_t i = 0; i < size; ++i) rounded_sums.values[i] = rounded(0, i);
        Learning<S> learning(random, c, size), from_rounded(random, c, size);
        learning.plain(sums, begin, end);
        kernels.update(learning.update, parts.data(), count, stride, {begin, end});
        learning.compare(report, "update", 4);
        from_rounded.plain(rounded_sums, begin, end);
        kernels.update_rounded(from_rounded.update, rounded.data(), 1, 0, {begin, end});
        from_rounded.compare(report, "update_rounded", 4);
      }
}

// ---- training steps ----

// A network and a batch.
struct Net {
  std::vector<int64_t> widths;
  std::vector<const char*> activations;
  LossCase loss;
  int64_t M;
  size_t lowest = 0;  // that learns
};

template <class S>
struct Step {
  struct Layer {
    int64_t K, N;
    Activation activation;
    Array<S> w, bias;
    Exact dw, db;
  };
  const Net& net;
  Random random;
  std::vector<Layer> layers;
  Array<S> x;
  Target<S> target;
  double loss = 0;

  explicit Step(const Net& net)
      : net(net), x(random, net.M, net.widths[0], 3), target(random, net.loss, net.M, net.widths.back()) {
    for (size_t l = 0; l + 1 < net.widths.size(); ++l) {
      const int64_t K = net.widths[l], N = net.widths[l + 1];
      const double scale = 1 / std::sqrt(static_cast<double>(K));
      layers.push_back({K, N, activation_of(net.activations[l]), Array<S>(random, N, K, 0, -2 * scale, 2 * scale),
                        Array<S>(random, 1, N), Exact{N, K}, Exact{1, N}});
    }
    plain();
  }
  bool has_bias(size_t l) const { return l % 3 != 1; }

 private:
  void plain() {
    std::vector<Exact> ys{exactly(x)}, zs;
    for (const Layer& l : layers) {
      Exact z{net.M, l.N};
      const size_t index = zs.size();
      for (int64_t m = 0; m < net.M; ++m)
        for (int64_t n = 0; n < l.N; ++n) {
          double sum = has_bias(index) ? l.bias(0, n) : 0;
          for (int64_t k = 0; k < l.K; ++k) sum += ys.back().at(m, k) * l.w(n, k);
          z.at(m, n) = sum;
        }
      zs.push_back(z);
      for (double& v : z.values) v = visit(l.activation, [&](auto act) { return act.forward(v); });
      ys.push_back(z);
    }
    Exact dy{net.M, layers.back().N};
    loss = target.plain(ys.back(), dy);
    for (size_t index = layers.size(); index-- > 0;) {
      Layer& l = layers[index];
      const Exact& saved = needs_of(l.activation) == Needs::preactivation ? zs[index] : ys[index + 1];
      for (size_t i = 0; i < dy.values.size(); ++i)
        dy.values[i] = visit(l.activation, [&](auto act) { return act.backward(dy.values[i], saved.values[i]); });
      Exact dx{net.M, l.K};
      for (int64_t m = 0; m < net.M; ++m)
        for (int64_t n = 0; n < l.N; ++n) {
          const double dz = dy.at(m, n);
          l.db.at(0, n) += dz;
          for (int64_t k = 0; k < l.K; ++k) {
            l.dw.at(n, k) += dz * ys[index].at(m, k);
            dx.at(m, k) += dz * l.w(n, k);
          }
        }
      l.dw.terms = 2 * l.dw.largest(), l.db.terms = 2 * l.db.largest();
      dy = dx;
    }
  }
};

// The errors of a few layers add up.
constexpr double kStepTimes = 16;

// rows and scratch_bytes of StepKernels or LaneKernels.
template <class S, class Bytes, class Rows>
void step_by_rows(Report& report, const Net& net, const Bytes& scratch_bytes, const Rows& sum_rows) {
  using T = Accumulator<S>;
  Step<S> step(net);
  int64_t size = 0;
  const auto take = [&](int64_t elements) { return std::exchange(size, size + elements); };
  std::vector<StepLayerView> views;
  for (size_t l = 0; l < step.layers.size(); ++l) {
    auto& layer = step.layers[l];
    const bool has_bias = step.has_bias(l), learns = l >= net.lowest;
    views.push_back({layer.K, layer.N, layer.w.in(), has_bias ? layer.bias.data() : nullptr, &layer.activation,
                     learns ? take(layer.K * layer.N) : -1, learns && has_bias ? take(layer.N) : -1});
  }
  const Limits limits;
  const StepProblem problem{step.x.in(), views, net.lowest, size, &limits, step.target.loss()};
  const int64_t half = net.M / 2;
  Array<T> sums(2, size);
  double loss = 0;
  bool valid = true;
  for (const auto& [p, rows] : {std::pair{0, Range{0, half}}, {1, Range{half, net.M}}}) {
    Scratch scratch(scratch_bytes(problem));
    loss += sum_rows(problem, rows, sums.data() + p * size, scratch.data(), valid);
    report.check(scratch.is_kept(), "rows", "needs more scratch than planned");
  }
  report.check(valid && sums.is_alone(), "rows");
  compare_loss(report, loss, step.loss, 64 * epsilon<T>);
  for (size_t l = net.lowest; l < views.size(); ++l) {
    Array<T> dw(views[l].N, views[l].K), db(1, views[l].N);
    dw.fill([&](int64_t n, int64_t k) {
      const int64_t i = views[l].dw + n * views[l].K + k;
      return sums(0, i) + sums(1, i);
    });
    report.compare(dw, step.layers[l].dw, "rows: dW", kStepTimes);
    if (views[l].db < 0) continue;
    db.fill([&](int64_t, int64_t n) { return sums(0, views[l].db + n) + sums(1, views[l].db + n); });
    report.compare(db, step.layers[l].db, "rows: db", kStepTimes);
  }
}

// As BatchStep of csrc/cpu/train.cpp does it with two threads.
template <class S>
void step_by_panels(Report& report, const Net& net) {
  const PanelKernels& kernels = *TARGET::panel_kernels(Format<S>::dtype);
  Step<S> step(net);
  const int64_t width = kernels.width(), M = net.M, panels = ceil_div(M, width);
  const auto features = [&](int64_t F) { return Array<S>(1, panels * width * F); };
  const double numbers[Optimizers::max_parameters] = {1};
  const Optimizer sgd = choose(Optimizers{}, index_of("sgd", Optimizers{}), numbers);
  const Activation identity = activation_of("identity");
  const size_t L = step.layers.size();
  std::vector<Array<S>> arrays;
  std::vector<Update> updates;
  std::vector<PanelLayer> layers;
  std::vector<Exact> new_w, new_b;
  arrays.reserve(3 * L + 1), updates.reserve(2 * L);
  const auto add = [&](int64_t F) { return static_cast<void*>(arrays.emplace_back(features(F)).data()); };
  const void* x = add(step.layers[0].K);
  void* dz_below = nullptr;
  for (size_t l = 0; l < L; ++l) {
    auto& layer = step.layers[l];
    const bool top = l + 1 == L, learns = l >= net.lowest;
    new_w.push_back(exactly(layer.w)), new_b.push_back(exactly(layer.bias));
    for (size_t i = 0; learns && i < new_w[l].values.size(); ++i) new_w[l].values[i] -= layer.dw.values[i];
    for (size_t i = 0; learns && step.has_bias(l) && i < new_b[l].values.size(); ++i)
      new_b[l].values[i] -= layer.db.values[i];
    PanelLayer p{M, layer.K, layer.N, layer.w.in(), step.has_bias(l) ? layer.bias.data() : nullptr};
    p.activation = top ? &identity : &layer.activation;
    p.activation_below = l > 0 ? &step.layers[l - 1].activation : nullptr;
    p.x = x;
    if (l == 0) p.rows_of_x = step.x.in();
    x = p.y = add(p.N);
    p.z = needs_of(*p.activation) == Needs::preactivation ? add(p.N) : nullptr;
    p.saved_below = l > 0 && layers[l - 1].z ? layers[l - 1].z : p.x;
    p.dz_below = l > net.lowest ? dz_below : nullptr;
    dz_below = p.dz = add(p.N);
    updates.push_back({layer.w.data(), {}, &sgd});
    p.update_w = learns ? &updates.back() : nullptr;
    updates.push_back({layer.bias.data(), {}, &sgd});
    p.update_b = learns && step.has_bias(l) ? &updates.back() : nullptr;
    layers.push_back(p);
  }
  const auto in_two = [](int64_t size, int64_t line) {
    const int64_t half = size / 2 / line * line;
    return std::array{Range{0, half}, Range{half, size}};
  };
  const auto rows_in_two = in_two(M, width);
  for (const Range rows : rows_in_two) kernels.input(step.x.in(), rows, layers[0].K, const_cast<void*>(layers[0].x));
  for (const PanelLayer& l : layers)
    for (const Range some : in_two(l.N, 16))
      for (const Range rows : rows_in_two)
        if (some.size() && rows.size()) kernels.forward(l, some, rows, Scratch(kScratchBytes).data());
  double loss = 0;
  bool valid = true;
  for (const Range rows : rows_in_two)
    loss += kernels.loss(step.target.loss(), layers.back(), step.layers.back().activation, rows,
                         Scratch(kScratchBytes).data(), valid);
  for (size_t l = L; l-- > net.lowest;) {
    const bool by_rows = !layers[l].dz_below;
    const auto rows = in_two(layers[l].N, 16), columns = in_two(layers[l].K, 16);
    for (const int half : {0, 1}) {
      Scratch scratch(kScratchBytes);
      kernels.backward(layers[l], by_rows ? rows[half] : Range{0, layers[l].N},
                       by_rows ? Range{0, layers[l].K} : columns[half], rows[half], scratch.data());
      report.check(scratch.is_kept(), "panels", "need more scratch than planned");
    }
  }
  report.check(valid, "panels");
  for (const auto& a : arrays) report.check(a.is_alone(), "panels", "are written past their end");
  compare_loss(report, loss, step.loss, 64 * epsilon<S>);
  for (size_t l = 0; l < L; ++l) {
    new_w[l].terms = new_b[l].terms = 2;
    report.compare(step.layers[l].w, new_w[l], "panels: W");
    report.compare(step.layers[l].bias, new_b[l], "panels: b");
  }
}

const Net kNets[] = {
    {{5, 9, 3}, {"relu", "identity"}, {"mse", {}, false, false}, 37},
    {{13, 20, 7, 1}, {"silu", "tanh", "sigmoid"}, {"bce", {}, false, false}, 101},
    {{30, 64, 33, 10}, {"gelu", "sigmoid", "identity"}, {"cross_entropy", {-100, 0.1}, true, true}, 70, 1},
    {{31, 100, 10}, {"leaky_relu", "identity"}, {"cross_entropy", {-100, 0}, false, true}, 130},
    {{70, 40, 2}, {"relu", "identity"}, {"bce_with_logits", {}, true, false}, 45},
    {{1, 17, 1}, {"tanh", "identity"}, {"huber", {0.5}, false, false}, 33},
    {{2, 3, 1}, {"elu", "identity"}, {"mse", {}, false, false}, 9000},
};

template <class S>
void test(Report& report) {
  test_losses<S>(report);
  test_updates<S>(report);
  for (const Net& net : kNets) {
    report.subject = std::string(Format<S>::name) + " network of " + net.loss.name + ", " + std::to_string(net.M);
    const StepKernels& kernels = TARGET::step_kernels(Format<S>::dtype);
    step_by_rows<S>(report, net, kernels.scratch_bytes, kernels.rows);
    if constexpr (sizeof(S) > 2) {
      const LaneKernels& lanes = *TARGET::lane_kernels(Format<S>::dtype);
      step_by_rows<S>(report, net, lanes.rows_scratch_bytes, lanes.rows);
      if (net.M * static_cast<int64_t>(sizeof(S)) <= kMostPanelBytes) step_by_panels<S>(report, net);
    } else {
      report.check(TARGET::panel_kernels(Format<S>::dtype) == nullptr, "panels", "of a 16-bit type");
    }
  }
}

}  // namespace

void test_steps(Report& report) {
  test<float>(report);
  test<double>(report);
  test<BFloat16>(report);
  test<Half>(report);
}

}  // namespace mlp_ext::cpu
