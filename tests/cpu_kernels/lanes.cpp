// Training steps of networks in lanes, beside plain loops in double.
#include "arrays.h"
#include "cases.h"

namespace mlp_ext::cpu {
namespace {

// Networks with the same layers and rows to train on.
struct Problem {
  std::vector<int64_t> widths;
  std::vector<const char*> activations;
  LossCase loss;
  OptimizerCase optimizer;
  int64_t rows, batch, epochs = 1;
  bool own_x = false, own_target = false;
  int orders = 0;  // 0: none, 1: one for all, 2: one for each
  size_t lowest = 0;
  bool mean = true;

  size_t layers() const { return activations.size(); }
  int64_t batches() const { return ceil_div(rows, batch); }
  int64_t steps() const { return epochs * batches(); }
  int64_t input_rows() const { return rows + (orders ? 3 : 0); }
  bool has_bias(size_t l) const { return l % 3 != 1; }
  // Weights and biases from the lowest layer on learn, except the second layer's bias and the last layer's weight.
  bool learns(size_t parameter) const {
    const size_t l = parameter / 2;
    if (l < lowest) return false;
    return parameter % 2 ? has_bias(l) : l == lowest || l + 1 < layers();
  }
};

template <class S>
struct Network {
  std::vector<Array<S>> values;               // weight and bias of each layer
  std::vector<std::vector<Array<S>>> states;  // of each parameter
  std::vector<std::array<double, Optimizers::max_parameters>> numbers;
  double count;
  Array<S> x, target, losses;
  std::vector<int64_t> classes, order;
  std::vector<LaneParameter> parameters;

  // The same network for the same seed and problem.
  Network(const Problem& p, int seed) : count(seed % 3), x(1, 1), target(1, 1), losses(1, p.steps()) {
    Random random;
    for (int i = 0; i < 7 * seed; ++i) random(0, 1);
    const auto vary = [&](double number) { return number == 0 || number == 1 ? number : number * random(0.8, 1); };
    for (size_t l = 0; l < p.layers(); ++l) {
      const int64_t K = p.widths[l], N = p.widths[l + 1];
      const double scale = 1 / std::sqrt(static_cast<double>(K));
      values.emplace_back(random, N, K, 0, -2 * scale, 2 * scale);
      values.emplace_back(random, 1, N);
    }
    for (auto& v : values) {
      auto& s = states.emplace_back();
      for (size_t i = 0; i < kMaxStates; ++i) s.emplace_back(random, v.rows, v.columns, 0, 0.3, 0.5);
      auto& n = numbers.emplace_back();
      // Weights and biases have hyperparameters of their own in networks with an odd number of layers.
      for (size_t i = 0; i < n.size(); ++i) n[i] = vary(p.optimizer.numbers[i]);
      if (numbers.size() > 1 && p.layers() % 2 == 0) n = numbers[0];
    }
    for (int64_t i = 0; p.orders && i < p.epochs * p.rows; ++i)
      order.push_back((i * 7 + (p.orders == 2 ? seed * 5 : 0)) % p.input_rows());
  }
};

// The input and target of all networks, or of one.
template <class S>
struct Data {
  Array<S> x, target;
  std::vector<int64_t> classes;

  Data(const Problem& p, int seed, int64_t gap)
      : x(p.input_rows(), p.widths[0], gap), target(p.input_rows(), p.widths.back(), gap) {
    Random random;
    for (int i = 0; i < 5 * seed; ++i) random(0, 1);
    x.fill([&](int64_t, int64_t) { return random(-1, 1); });
    target.fill([&](int64_t, int64_t) { return random(0.1, 0.9); });
    for (int64_t m = 0; p.loss.of_classes && m < p.input_rows(); ++m)
      classes.insert(classes.end(), {(m * 7 + 1 + seed) % p.widths.back(), -9});
  }
};

// A call of the kernel.
template <class S>
struct Call {
  const Problem& p;
  std::vector<Data<S>> data;  // of network 0, ...; shared parts are those of network 0
  std::vector<Network<S>> networks;
  std::vector<Activation> activations;
  LossFunction loss;
  Array<S> weight;

  Call(const Problem& p, const std::vector<int>& seeds)
      : p(p), loss(choose(Losses{}, index_of(p.loss.name, Losses{}), p.loss.numbers)), weight(1, p.widths.back()) {
    Random random;
    weight.fill([&](int64_t, int64_t) { return random(0.5, 1.5); });
    for (const char* name : p.activations) activations.push_back(activation_of(name));
    data.reserve(seeds.size() + 1), networks.reserve(seeds.size());
    data.emplace_back(p, 0, 0);
    for (const int seed : seeds) {
      networks.emplace_back(p, seed);
      data.emplace_back(p, seed + 1, seed % 2 ? 3 : 0);
    }
  }
  Data<S>& x_of(size_t e) { return data[p.own_x ? e + 1 : 0]; }
  Data<S>& target_of(size_t e) { return data[p.own_target ? e + 1 : 0]; }

  std::vector<int64_t> run(Report& report) {
    const LaneKernels& kernels = *TARGET::lane_kernels(Format<S>::dtype);
    std::vector<LaneLayer> layers;
    for (size_t l = 0; l < p.layers(); ++l)
      layers.push_back({p.widths[l], p.widths[l + 1], &activations[l], p.has_bias(l), p.learns(2 * l),
                        p.has_bias(l) && p.learns(2 * l + 1)});
    const size_t optimizer = index_of(p.optimizer.name, Optimizers{});
    const LaneProblem problem{layers,
                              p.lowest,
                              &loss,
                              p.mean,
                              p.loss.weighted ? weight.data() : nullptr,
                              optimizer,
                              p.rows,
                              p.batch,
                              p.epochs,
                              !p.own_x,
                              !p.own_target,
                              p.orders < 2,
                              ceil_div(p.rows, p.batch)};
    std::vector<LaneNetwork> lanes;
    for (size_t e = 0; e < networks.size(); ++e) {
      Network<S>& n = networks[e];
      n.parameters.clear();
      for (size_t i = 0; i < n.values.size(); ++i) {
        LaneParameter lp{n.values[i].data(), {}, n.numbers[i].data(), n.count};
        visit(choose(Optimizers{}, optimizer, n.numbers[i].data()), [&](auto o) {
          for (size_t s = 0; s < o.states.size(); ++s)
            if (o.has_state(s)) lp.states[s] = n.states[i][s].data();
        });
        n.parameters.push_back(lp);
      }
      Data<S>& target = target_of(e);
      const Network<S>& first = networks[0];
      const auto& order = p.orders == 1 ? first.order : n.order;
      lanes.push_back({n.parameters.data(), x_of(e).x.in(), target.target.in(),
                       p.loss.of_classes ? target.classes.data() : nullptr, 2, p.orders ? order.data() : nullptr,
                       n.losses.data(), -1});
    }
    Scratch scratch(kernels.scratch_bytes(problem));
    kernels.train(problem, lanes, scratch.data());
    report.check(scratch.is_kept(), "lanes", "need more scratch than planned");
    std::vector<int64_t> done;
    for (const LaneNetwork& l : lanes) done.push_back(l.done);
    for (const Network<S>& n : networks) {
      report.check(n.losses.is_alone(), "losses", "are written past their end");
      for (size_t i = 0; i < n.values.size(); ++i) report.check(n.values[i].is_alone(), "parameters", "past their end");
    }
    return done;
  }

  // Trains network e by plain loops in double, from its present parameters on.
  struct Plain {
    std::vector<Exact> values;
    std::vector<std::vector<Exact>> states;
    std::vector<double> losses;
  };
  Plain plain(size_t e) {
    const Network<S>& n = networks[e];
    const Data<S>&x = x_of(e), &t = target_of(e);
    const auto& order = p.orders == 1 ? networks[0].order : n.order;
    Plain found;
    for (const auto& v : n.values) found.values.push_back(exactly(v));
    for (const auto& s : n.states) {
      found.states.emplace_back();
      for (const auto& a : s) found.states.back().push_back(exactly(a));
    }
    const size_t L = p.layers(), optimizer = index_of(p.optimizer.name, Optimizers{});
    for (int64_t step = 0; step < p.steps(); ++step) {
      const int64_t epoch = step / p.batches(), begin = step % p.batches() * p.batch;
      const int64_t M = std::min(p.batch, p.rows - begin), N = p.widths.back();
      const auto row = [&](int64_t m) { return p.orders ? order[epoch * p.rows + begin + m] : begin + m; };
      std::vector<Exact> gradients;
      for (const Exact& v : found.values) gradients.push_back(Exact{v.rows, v.columns});
      double count = 0, total = 0;
      const int64_t ignored = ignore_index_of(loss);
      const auto w = [&](int64_t c) { return p.loss.weighted ? weight(0, c) : 1; };
      if (p.loss.of_classes) {
        for (int64_t m = 0; m < M; ++m)
          if (const int64_t c = t.classes[2 * row(m)]; c != ignored) count += w(c);
      } else {
        count = static_cast<double>(is_of_rows_loss(loss) ? M : M * N);
      }
      const double scale = p.mean ? 1 / count : 1;
      for (int64_t m = 0; m < M; ++m) {
        std::vector<std::vector<double>> ys(1), zs;
        for (int64_t k = 0; k < p.widths[0]; ++k) ys[0].push_back(x.x(row(m), k));
        for (size_t l = 0; l < L; ++l) {
          std::vector<double> z;
          for (int64_t o = 0; o < p.widths[l + 1]; ++o) {
            double sum = p.has_bias(l) ? found.values[2 * l + 1].at(0, o) : 0;
            for (int64_t k = 0; k < p.widths[l]; ++k) sum += ys[l][k] * found.values[2 * l].at(o, k);
            z.push_back(sum);
          }
          zs.push_back(z);
          for (double& v : z) v = visit(activations[l], [&](auto act) { return act.forward(v); });
          ys.push_back(z);
        }
        std::vector<double> dy(N);
        total += loss_of_row(t, row(m), ys[L], dy, scale);
        for (size_t l = L; l-- > p.lowest;) {
          const auto& saved = needs_of(activations[l]) == Needs::preactivation ? zs[l] : ys[l + 1];
          std::vector<double> dx(p.widths[l]);
          for (size_t o = 0; o < dy.size(); ++o) {
            const double dz = visit(activations[l], [&](auto act) { return act.backward(dy[o], saved[o]); });
            gradients[2 * l + 1].values[o] += dz;
            for (size_t k = 0; k < dx.size(); ++k) {
              gradients[2 * l].at(o, k) += dz * ys[l][k];
              dx[k] += dz * found.values[2 * l].at(o, k);
            }
          }
          dy = dx;
        }
      }
      found.losses.push_back(total * scale);
      for (size_t i = 0; i < gradients.size(); ++i) {
        if (!p.learns(i)) continue;
        const Optimizer chosen =
            at_step(choose(Optimizers{}, optimizer, n.numbers[i].data()), n.count + static_cast<double>(step) + 1);
        for (size_t j = 0; j < gradients[i].values.size(); ++j) {
          double states[kMaxStates];
          for (size_t s = 0; s < kMaxStates; ++s) states[s] = found.states[i][s].values[j];
          visit(chosen, [&](auto o) {
            o.update(found.values[i].values[j], states, gradients[i].values[j]);
            for (size_t s = 0; s < o.states.size(); ++s)
              if (o.has_state(s)) found.states[i][s].values[j] = states[s];
          });
        }
      }
    }
    return found;
  }

 private:
  struct Row {
    const Call& of;
    const Data<S>& data;
    int64_t m;
    const std::vector<double>& outputs;
    std::vector<double>& gradients;
    int64_t c() const { return data.classes.empty() ? -1 : data.classes[2 * m]; }
    double z(int64_t n) const { return outputs[n]; }
    double w(int64_t n) const { return of.p.loss.weighted ? of.weight(0, n) : 1; }
    double exp(int64_t n, double most) const { return std::exp(z(n) - most); }
    double sum_exp(double most) const {
      double sum = 0;
      for (const double z : outputs) sum += std::exp(z - most);
      return sum;
    }
    double t(int64_t n) const { return data.target(m, n); }
    void put(int64_t n, double v) const { gradients[n] = v; }
  };
  double loss_of_row(const Data<S>& t, int64_t m, const std::vector<double>& y, std::vector<double>& dy,
                     double scale) const {
    const Row row{*this, t, m, y, dy};
    const auto N = static_cast<int64_t>(y.size());
    return visit(loss, [&](auto l) {
      double sum = 0;
      if constexpr (is_of_rows<decltype(l)>) {
        if (row.c() >= 0 && row.c() == ignore_index_of(loss)) return 0.0;
        sum = l.template row<double>(row, N, scale);
      } else {
        for (int64_t n = 0; n < N; ++n) {
          sum += l.forward(y[n], row.t(n), row.w(n));
          dy[n] = l.backward(y[n], row.t(n), row.w(n), scale);
        }
      }
      return sum;
    });
  }
};

template <class S>
bool same_bits(const Array<S>& a, const Array<S>& b) {
  return exactly(a).values.size() == exactly(b).values.size() &&
         std::memcmp(const_cast<Array<S>&>(a).data(), const_cast<Array<S>&>(b).data(),
                     sizeof(S) * static_cast<size_t>(a.rows * a.columns)) == 0;
}
template <class S>
bool same_bits(const Network<S>& a, const Network<S>& b) {
  bool same = same_bits(a.losses, b.losses);
  for (size_t i = 0; i < a.values.size(); ++i) {
    same = same && same_bits(a.values[i], b.values[i]);
    for (size_t s = 0; s < kMaxStates; ++s) same = same && same_bits(a.states[i][s], b.states[i][s]);
  }
  return same;
}

std::vector<int> seeds(int64_t count, int first = 0) {
  std::vector<int> all;
  for (int64_t i = 0; i < count; ++i) all.push_back(first + static_cast<int>(i));
  return all;
}

template <class S>
void compare(Report& report, const Problem& p, int64_t count) {
  report.subject = std::string(Format<S>::name) + " " + p.loss.name + " " + p.optimizer.name + " " + p.activations[0] +
                   ", " + std::to_string(p.rows) + " by " + std::to_string(p.batch) + ", " + std::to_string(count) +
                   " networks";
  Call<S> call(p, seeds(count));
  std::vector<typename Call<S>::Plain> exact;
  const int64_t compared = std::min<int64_t>(count, 3);  // the first two and the last
  const auto network = [&](int64_t i) { return i == 2 ? count - 1 : i; };
  for (int64_t i = 0; i < compared; ++i) exact.push_back(call.plain(network(i)));
  const std::vector<int64_t> done = call.run(report);
  const double times = 16 * static_cast<double>(p.steps());
  for (int64_t i = 0; i < compared; ++i) {
    Network<S>& n = call.networks[network(i)];
    report.check(done[network(i)] == p.steps(), "steps", std::to_string(done[network(i)]) + " done");
    for (int64_t s = 0; s < p.steps(); ++s) {
      const double most = 1e-3 + std::abs(exact[i].losses[s]);
      report.check(
          std::abs(n.losses(0, s) - exact[i].losses[s]) <= 8 * times * epsilon<S> * most, "loss",
          std::to_string(s) + " is " + std::to_string(n.losses(0, s)) + ", not " + std::to_string(exact[i].losses[s]));
    }
    for (size_t v = 0; v < n.values.size(); ++v) {
      exact[i].values[v].terms = 2 * exact[i].values[v].largest();
      report.compare(n.values[v], exact[i].values[v], v % 2 ? "bias" : "weight", times);
      for (size_t s = 0; s < kMaxStates; ++s) {
        exact[i].states[v][s].terms = 2 * exact[i].states[v][s].largest();
        report.compare(n.states[v][s], exact[i].states[v][s], "state", times);
      }
    }
  }
  // The bits of a network do not depend on the others.
  const auto last = static_cast<int>(count - 1);
  Call<S> alone(p, {0}), turned(p, {last, 0});
  alone.run(report);
  report.check(same_bits(alone.networks[0], call.networks[0]), "bits", "of a network alone differ");
  if (count == 1) return;
  turned.run(report);
  report.check(same_bits(turned.networks[1], call.networks[0]) &&
                   same_bits(turned.networks[0], call.networks[static_cast<size_t>(last)]),
               "bits", "depend on the other networks");
}

template <class S>
void test(Report& report) {
  const LaneKernels* const kernels = TARGET::lane_kernels(Format<S>::dtype);
  const int64_t lanes = kernels->lanes();
  int turn = 0;
  const auto count = [&] { return std::array<int64_t, 4>{lanes, lanes - 1, 1, 2}[turn++ % 4]; };
  const OptimizerCase sgd = kOptimizers[0];

  // All optimizers, losses and activations, with each of the others in turn.
  for (const OptimizerCase& o : kOptimizers)
    for (const int64_t rows : {10, 13})
      compare<S>(report,
                 {{10, 5, 1},
                  {"tanh", "identity"},
                  {"mse", {}, false, false},
                  o,
                  rows,
                  5,
                  2,
                  rows == 13,
                  false,
                  rows == 13 ? 2 : 0},
                 count());
  for (const LossCase& l : kLosses) {
    const char* const top = l.name == std::string("bce") ? "sigmoid" : "identity";
    for (const int orders : {0, 1, 2})
      compare<S>(report,
                 {{4, 7, 3}, {"silu", top}, l, sgd, 45, 40, 2, orders == 2, orders != 1, orders, 0, orders != 1},
                 count());
  }
  [&]<class... Act>(TypeList<Act...>) {
    (compare<S>(report,
                {{3, 9, 6, 2},
                 {Act::name, "identity", Act::name},
                 {"mse", {}, false, false},
                 sgd,
                 37,
                 37,
                 2,
                 sizeof(Act) % 2 == 0,
                 true},
                count()),
     ...);
  }(Activations{});
  // Widths around the tiles, several blocks of rows, and layers that do not learn.
  for (const int64_t width : {1, 2, 3, 4, 5, 6, 7, 8, 17, 33})
    compare<S>(report,
               {{width, width, width + 1, 1},
                {"relu", "sigmoid", "identity"},
                {"huber", {0.5}, false, false},
                kOptimizers[1],
                67,
                33,
                1,
                width % 2 == 0,
                false,
                0,
                static_cast<size_t>(width % 3)},
               count());
  // Sums of many rows.
  compare<S>(report, {{24, 8, 2}, {"relu", "identity"}, {"cross_entropy", {-100, 0}, false, true}, sgd, 500, 300, 1},
             2);
  compare<S>(report, {{2, 3, 1}, {"relu", "identity"}, {"mse", {}, false, false}, {"sgd", {0.1}}, 50000, 50000, 1}, 2);
}

// Rows that networks share give the same bits as copies of them.
template <class S>
void test_shared_rows(Report& report) {
  report.subject = std::string(Format<S>::name) + " shared rows";
  for (const int orders : {0, 1}) {
    const Problem shared{
        {19, 6, 2}, {"relu", "identity"}, {"mse", {}, false, false}, kOptimizers[1], 45, 40, 2, false, false, orders};
    Problem own = shared;
    own.own_x = own.own_target = true;
    Call<S> a(shared, seeds(2)), b(own, seeds(2));
    for (auto& d : b.data) {
      d.x.fill([&](int64_t i, int64_t j) { return a.data[0].x(i, j); });
      d.target.fill([&](int64_t i, int64_t j) { return a.data[0].target(i, j); });
    }
    a.run(report), b.run(report);
    for (size_t e = 0; e < 2; ++e) report.check(same_bits(a.networks[e], b.networks[e]), "bits", "of copies differ");
  }
}

// A network whose loss refuses its target stops there; NaN stays in its lane.
template <class S>
void test_failures(Report& report) {
  report.subject = std::string(Format<S>::name) + " failures";
  const int64_t lanes = TARGET::lane_kernels(Format<S>::dtype)->lanes();
  for (const OptimizerCase& o : kOptimizers) {
    const Problem p{{6, 5, 2}, {"relu", "sigmoid"}, {"bce", {}, false, false}, o, 40, 10, 2, true, true};
    Problem two_steps = p;
    two_steps.rows = 20, two_steps.epochs = 1;
    Call<S> healthy(p, seeds(lanes)), one_fails(p, seeds(lanes)), stopped(two_steps, {1});
    healthy.run(report);
    one_fails.data[2].target.fill([&](int64_t i, int64_t j) { return i == 25 ? 1.5 : healthy.data[2].target(i, j); });
    stopped.data[1].x.fill([&](int64_t i, int64_t j) { return one_fails.data[2].x(i, j); });
    stopped.data[1].target.fill([&](int64_t i, int64_t j) { return one_fails.data[2].target(i, j); });
    stopped.run(report);
    const std::vector<int64_t> done = one_fails.run(report);
    for (int64_t e = 0; e < lanes; ++e) {
      report.check(done[e] == (e == 1 ? 2 : 8), "steps", std::to_string(done[e]) + " done");
      if (e != 1)
        report.check(same_bits(one_fails.networks[e], healthy.networks[e]), "bits", "of healthy networks differ");
    }
    for (size_t i = 0; i < stopped.networks[0].values.size(); ++i)
      report.check(same_bits(stopped.networks[0].values[i], one_fails.networks[1].values[i]) &&
                       same_bits(stopped.networks[0].states[i][0], one_fails.networks[1].states[i][0]),
                   "parameters", "of a failed network");
    // All fail at once.
    Call<S> all(p, seeds(2));
    const Network<S> before(p, 0);
    for (auto& d : all.data) d.target.fill([](int64_t, int64_t) { return NAN; });
    report.check(all.run(report) == std::vector<int64_t>{0, 0}, "all", "do not fail");
    for (size_t i = 0; i < before.values.size(); ++i)
      report.check(same_bits(all.networks[0].values[i], before.values[i]), "parameters", "change though all failed");

    const Problem q{{6, 5, 2}, {"tanh", "identity"}, {"mse", {}, false, false}, o, 20, 10, 2};
    Call<S> finite(q, seeds(lanes)), one_nan(q, seeds(lanes));
    one_nan.networks[1].values[0].fill([](int64_t, int64_t) { return NAN; });
    finite.run(report), one_nan.run(report);
    for (int64_t e = 0; e < lanes; ++e)
      if (e != 1) report.check(same_bits(one_nan.networks[e], finite.networks[e]), "bits", "beside NaN");
    report.check(std::isnan(one_nan.networks[1].losses(0, 0)), "NaN", "is lost");
  }
}

}  // namespace

void test_lanes(Report& report) {
  test<float>(report);
  test<double>(report);
  test_shared_rows<float>(report);
  test_shared_rows<double>(report);
  test_failures<float>(report);
  test_failures<double>(report);
  for (const DType dtype : {DType::bfloat16, DType::float16})
    report.check(TARGET::lane_kernels(dtype) == nullptr, "lanes", "of a 16-bit type");
}

}  // namespace mlp_ext::cpu
