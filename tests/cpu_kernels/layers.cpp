// Every kernel of a layer over awkward shapes, beside plain loops in double.
#include "arrays.h"
#include "math/activations.h"
#include "math/optimizers.h"

namespace mlp_ext::cpu {
namespace {

constexpr int64_t kLine = 16;  // pieces begin at its multiples

// A B for A [rows, depth] and B [depth, columns], either of them transposed in memory.
struct Operand {
  const Exact& matrix;
  bool transposed = false;
  double at(int64_t i, int64_t j) const { return transposed ? matrix.at(j, i) : matrix.at(i, j); }
};
Exact product(Operand a, Operand b, int64_t rows, int64_t depth, int64_t columns) {
  Exact c{rows, columns};
  std::vector<double> b_row(columns), terms(rows);
  for (int64_t k = 0; k < depth; ++k) {
    double most = 0;
    for (int64_t j = 0; j < columns; ++j) most = std::max(most, std::abs(b_row[j] = b.at(k, j)));
    for (int64_t i = 0; i < rows; ++i) {
      const double aik = a.at(i, k);
      double* const c_row = c.values.data() + i * columns;
      for (int64_t j = 0; j < columns; ++j) c_row[j] += aik * b_row[j];
      terms[i] += std::abs(aik) * most;
    }
  }
  for (const double t : terms) c.terms = std::max(c.terms, t);
  return c;
}

Activation activation_of(size_t index) {
  return visit(Activations{}, index, [&](auto act) { return Activation(index, act); });
}

// The thirds of a range that begin at a multiple of `line`.
std::vector<Range> pieces_of(int64_t size, int64_t line = kLine) {
  std::vector<Range> pieces;
  const int64_t lines = ceil_div(size, line);
  for (int64_t p = 0; p < 3; ++p)
    if (const Range r{p * lines / 3 * line, std::min(size, (p + 1) * lines / 3 * line)}; r.size() > 0 || p == 2)
      pieces.push_back(r);
  return pieces;
}

template <class S>
class LayerTest {
  using T = Accumulator<S>;

 public:
  LayerTest(Report& report, int64_t M, int64_t K, int64_t N, size_t activation, int64_t gap)
      : report_(report),
        M_(M),
        K_(K),
        N_(N),
        gap_(gap),
        activation_(activation_of(activation)),
        needs_z_(needs_of(activation_) == Needs::preactivation),
        x_(random_, M, K, gap),
        w_(random_, N, K, gap),
        bias_(random_, 1, N),
        dy_(random_, M, N, gap),
        saved_(M, N, gap) {
    const char* const name = visit(activation_, [](auto act) { return act.name; });
    report_.subject = std::string(Format<S>::name) + " " + std::to_string(M) + "x" + std::to_string(K) + "x" +
                      std::to_string(N) + " " + name + (gap ? ", rows apart" : "");
    const Exact x = exactly(x_), w = exactly(w_), dy = exactly(dy_);
    z_ = product({x}, {w, true}, M, K, N);
    has_bias_ = activation % 2 == 0 || N % 2 == 1;
    if (has_bias_)
      for (int64_t m = 0; m < M; ++m)
        for (int64_t n = 0; n < N; ++n) z_.at(m, n) += bias_(0, n);
    z_.terms += 1;
    y_ = z_;
    for (double& y : y_.values) y = visit(activation_, [&](auto act) { return act.forward(y); });
    saved_.fill([&](int64_t m, int64_t n) { return (needs_z_ ? z_ : y_).at(m, n); });
    dz_ = dy;
    for (int64_t m = 0; m < M; ++m)
      for (int64_t n = 0; n < N; ++n)
        dz_.at(m, n) = visit(activation_, [&](auto act) { return act.backward(dy_(m, n), saved_(m, n)); });
    dz_.terms = dz_.largest();
    dx_ = product({dz_}, {w}, M, N, K);
    dw_ = product({dz_, true}, {x}, N, M, K);
    Exact ones{1, M};
    std::fill(ones.values.begin(), ones.values.end(), 1.0);
    db_ = product({ones}, {dz_}, 1, M, N);
  }

  void run() {
    if (supports(Path::small, shape(), true)) forward("small");
    forward("dots");
    if (supports(Path::narrow, shape(), true) || supports(Path::one_input, shape(), true)) forward("narrow");
    if (packs()) forward("packed");
    act_in_place();
    if (supports(Path::small, shape(), false)) small_backward();
    grad_z();
    if (packs()) grad_input();
    grad_weight();
    if (supports(Path::few_rows, shape(), false)) few_rows();
    if (supports(Path::tall, shape(), false)) one_pass("backward_tall", kernels_.backward_tall);
    if (supports(Path::narrow, shape(), false)) one_pass("backward_narrow", kernels_.backward_narrow);
    if (supports(Path::one_input, shape(), false)) one_pass("backward_k1", kernels_.backward_k1);
    if (supports(Path::one_output, shape(), false)) one_pass("backward_n1", kernels_.backward_n1);
    if (K_ > 0) update_in_epilogue();
    if constexpr (std::is_same_v<S, BFloat16>) tiles();
  }

  // Products in tiles.
  void tiles() {
    const LayerShape tiled{M_, K_, N_, sizeof(S), DotMode::amx};
    if (supports(Path::amx, tiled, true)) tiled_forward();
    if (supports(Path::amx, tiled, false))
      for (const bool in_parts : {false, true})
        for (const bool updates : {false, true}) tiled_backward(in_parts, updates);
  }

 private:
  int64_t gap_of(int64_t columns) const { return columns == 1 ? 0 : gap_; }  // results of one column are contiguous
  bool packs() const { return sizeof(S) > 2 || M_ <= kRowsPerPiece; }
  LayerShape shape() const { return {M_, K_, N_, sizeof(S), DotMode::fma}; }

  Forward problem(Array<S>& y, Array<S>& z) {
    return {M_,          K_,
            N_,          x_.in(),
            w_.in(),     has_bias_ ? bias_.data() : nullptr,
            y.out(),     needs_z_ ? z.out() : Matrix{},
            &activation_};
  }
  Backward problem(Array<S>* dx, void* dw, void* db) {
    return {M_,
            K_,
            N_,
            dy_.in(),
            activation_.index ? saved_.in() : ConstMatrix{},
            x_.in(),
            w_.in(),
            dx ? dx->out() : Matrix{},
            dw,
            db,
            &activation_};
  }
  void check_scratch(Scratch& scratch, const char* what) {
    report_.check(scratch.is_kept(), what, "needs more scratch than planned");
  }

  // Whole and, where threads may share the work, in pieces.
  void forward(const std::string& path) {
    for (const bool in_pieces : {false, true}) {
      if (in_pieces && path == "small") continue;
      Array<S> y(M_, N_, gap_of(N_)), z(M_, N_, gap_of(N_));
      Forward f = problem(y, z);
      if (in_pieces) f.block_bytes = 1 << 14, f.y_past_caches = true;
      Scratch scratch(path == "small" ? small_forward_scratch_bytes(K_, N_) : kScratchBytes);
      const auto piece = path == "dots"     ? kernels_.forward_dots
                         : path == "narrow" ? kernels_.forward_narrow
                                            : kernels_.forward;
      if (path == "small")
        kernels_.small_forward(f, scratch.data());
      else if (!in_pieces)
        piece(f, {0, M_}, {0, N_}, scratch.data());
      else
        for (const Range rows : pieces_of(M_))
          for (const Range columns : pieces_of(N_)) piece(f, rows, columns, scratch.data());
      const std::string what = "forward " + path + (in_pieces ? " in pieces" : "");
      report_.compare(y, y_, what.c_str());
      if (needs_z_) report_.compare(z, z_, (what + ": z").c_str());
      check_scratch(scratch, what.c_str());
    }
  }

  void act_in_place() {
    Array<S> y(M_, N_, gap_of(N_));
    y.fill([&](int64_t m, int64_t n) { return z_.at(m, n); });
    Exact exact = exactly(y);
    for (double& v : exact.values) v = visit(activation_, [&](auto act) { return act.forward(v); });
    kernels_.act(problem(y, y), y.in(), {0, M_});
    report_.compare(y, exact, "act");
  }

  void small_backward() {
    Array<S> dx(M_, K_, gap_of(K_)), dw(N_, K_), db(1, N_);
    Scratch scratch(small_backward_scratch_bytes(M_, N_));
    kernels_.small_backward(problem(&dx, dw.data(), db.data()), scratch.data());
    report_.compare(dx, dx_, "small_backward: dx");
    report_.compare(dw, dw_, "small_backward: dW");
    report_.compare(db, db_, "small_backward: db");
    check_scratch(scratch, "small_backward");
  }

  void grad_z() {
    Array<S> dz(M_, N_);
    Array<T> db(1, N_);
    kernels_.grad_z(problem(nullptr, nullptr, nullptr), {0, M_}, dz.data(), db.data());
    report_.compare(dz, dz_, "grad_z: dz");
    report_.compare(db, db_, "grad_z: db");
  }

  void grad_input() {
    for (const bool in_pieces : {false, true}) {
      Array<S> dx(M_, K_, gap_of(K_));
      Backward b = problem(&dx, nullptr, nullptr);
      if (in_pieces) b.block_bytes = 1 << 14, b.dx_past_caches = b.dw_past_caches = true;
      Scratch scratch(kScratchBytes);
      for (const Range rows : in_pieces ? pieces_of(M_) : std::vector<Range>{{0, M_}})
        for (const Range columns : in_pieces ? pieces_of(K_) : std::vector<Range>{{0, K_}})
          kernels_.grad_input(b, rows, columns, scratch.data());
      report_.compare(dx, dx_, in_pieces ? "grad_input in pieces" : "grad_input");
      check_scratch(scratch, "grad_input");
    }
  }

  void compare_sums(Array<T>& dw, Array<T>& db, const std::string& what) {
    Array<S> dw_rounded(N_, K_), db_rounded(1, N_);
    const int64_t parts = dw.rows;
    for (const Range piece : pieces_of(N_ * K_)) kernels_.combine(dw.data(), parts, N_ * K_, piece, dw_rounded.data());
    kernels_.combine(db.data(), parts, N_, {0, N_}, db_rounded.data());
    report_.compare(dw_rounded, dw_, (what + ": dW").c_str());
    report_.compare(db_rounded, db_, (what + ": db").c_str());
    report_.check(dw.is_alone() && db.is_alone(), what.c_str(), "is written past its end");
  }

  void grad_weight() {
    for (const bool in_pieces : {false, true}) {
      if (K_ == 0) continue;  // there is no dW
      const auto samples = in_pieces ? pieces_of(M_) : std::vector<Range>{{0, M_}};
      const auto parts = static_cast<int64_t>(samples.size());
      Array<T> dw(parts, N_ * K_), db(parts, N_);
      Backward b = problem(nullptr, nullptr, nullptr);
      if (in_pieces) b.block_bytes = 1 << 14, b.dx_past_caches = b.dw_past_caches = true;
      Scratch scratch(kScratchBytes);
      for (int64_t p = 0; p < parts; ++p)
        for (const Range rows : in_pieces ? pieces_of(N_) : std::vector<Range>{{0, N_}})
          for (const Range columns : in_pieces ? pieces_of(K_) : std::vector<Range>{{0, K_}})
            kernels_.grad_weight(b, rows, columns, samples[p], dw.data() + p * N_ * K_, db.data() + p * N_,
                                 scratch.data());
      compare_sums(dw, db, in_pieces ? "grad_weight in pieces" : "grad_weight");
      check_scratch(scratch, "grad_weight");
    }
    Array<T> db(1, N_);
    Scratch scratch(kScratchBytes);
    kernels_.grad_weight(problem(nullptr, nullptr, nullptr), {0, N_}, {0, K_}, {0, M_}, nullptr, db.data(),
                         scratch.data());
    Array<S> rounded(1, N_);
    kernels_.combine(db.data(), 1, N_, {0, N_}, rounded.data());
    report_.compare(rounded, db_, "db alone");
  }

  // In pieces of its columns, or of its rows, which each have sums of dx.
  void few_rows() {
    for (const bool by_rows : {false, true}) {
      Array<S> dx(M_, K_, gap_of(K_)), dw(N_, K_), db(1, N_);
      Scratch scratch(kScratchBytes);
      const Backward b = problem(&dx, dw.data(), db.data());
      const auto pieces = pieces_of(by_rows ? N_ : K_);
      const auto parts = static_cast<int64_t>(pieces.size());
      Array<T> sums(parts, M_ * K_);
      for (int64_t p = 0; p < parts; ++p)
        if (by_rows)
          kernels_.backward_few_rows(b, pieces[p], {0, K_}, sums.data() + p * M_ * K_, scratch.data());
        else
          kernels_.backward_few_rows(b, {0, N_}, pieces[p], nullptr, scratch.data());
      if (by_rows) {
        Array<S> total(M_, K_);
        kernels_.combine(sums.data(), parts, M_ * K_, {0, M_ * K_}, total.data());
        report_.compare(total, dx_, "few_rows by rows: dx");
        report_.check(sums.is_alone(), "few_rows", "writes past its sums of dx");
      } else {
        report_.compare(dx, dx_, "few_rows: dx");
      }
      report_.compare(dw, dw_, "few_rows: dW");
      report_.compare(db, db_, "few_rows: db");
      check_scratch(scratch, "few_rows");
    }
  }

  void one_pass(const char* what, decltype(LayerKernels::backward_tall) kernel) {
    for (const auto& samples : {pieces_of(M_), std::vector<Range>{{0, M_}}}) {
      const auto parts = static_cast<int64_t>(samples.size());
      Array<S> dx(M_, K_, gap_of(K_));
      Array<T> dw(parts, N_ * K_), db(parts, N_);
      Scratch scratch(kScratchBytes);
      for (int64_t p = 0; p < parts; ++p)
        kernel(problem(&dx, nullptr, nullptr), samples[p], dw.data() + p * N_ * K_, db.data() + p * N_, scratch.data());
      report_.compare(dx, dx_, what);
      compare_sums(dw, db, what);
      check_scratch(scratch, what);
    }
  }

  // W and b learn in the last write of dW.
  void update_in_epilogue() {
    const double numbers[Optimizers::max_parameters] = {0.25};
    const Optimizer sgd = choose(Optimizers{}, index_of("sgd", Optimizers{}), numbers);
    Array<S> w(N_, K_), bias(1, N_);
    w.fill([&](int64_t n, int64_t k) { return w_(n, k); });
    bias.fill([&](int64_t, int64_t n) { return bias_(0, n); });
    const Update update_w{w.data(), {}, &sgd}, update_b{bias.data(), {}, &sgd};
    Exact new_w = exactly(w), new_b = exactly(bias);
    for (size_t i = 0; i < new_w.values.size(); ++i) new_w.values[i] -= 0.25 * dw_.values[i];
    for (size_t i = 0; i < new_b.values.size(); ++i) new_b.values[i] -= 0.25 * db_.values[i];
    new_w.terms += dw_.terms, new_b.terms += db_.terms;
    Backward b = problem(nullptr, nullptr, nullptr);
    b.update_w = &update_w, b.update_b = &update_b;
    Array<T> dw(1, N_ * K_), db(1, N_);
    Scratch scratch(kScratchBytes);
    for (const Range rows : pieces_of(N_))
      kernels_.grad_weight(b, rows, {0, K_}, {0, M_}, dw.data(), db.data(), scratch.data());
    report_.compare(w, new_w, "update of W");
    report_.compare(bias, new_b, "update of b");
  }

  // A packed operand; packed whole, and so longer, `pack` would write past its end.
  using Panels = Array<BFloat16>;
  static Panels panels(int64_t lines, int64_t depth) {
    return {1, tile_panels_bytes(lines, depth) / static_cast<int64_t>(sizeof(BFloat16))};
  }
  static std::vector<Range> panels_of(int64_t size, bool in_pieces) {
    return in_pieces ? pieces_of(size, kPanelSide) : std::vector<Range>{{0, size}};
  }

  // W is packed before, or when it is needed.
  void tiled_forward() {
    for (const bool packed_before : {false, true})
      for (const bool in_pieces : {false, true}) {
        Panels w = panels(N_, K_);
        if (packed_before)
          for (const Range lines : panels_of(N_, in_pieces))
            tile_kernels_.pack_b_transposed(w_.in(), lines, K_, w.data());
        Array<S> y(M_, N_, gap_), z(M_, N_, gap_);
        const Forward f = problem(y, z);
        Scratch scratch(kScratchBytes);
        for (const Range rows : panels_of(M_, in_pieces))
          for (const Range columns : panels_of(N_, in_pieces))
            tile_kernels_.forward(f, packed_before ? w.data() : nullptr, rows, columns, scratch.data());
        const std::string what = std::string("forward in tiles") + (packed_before ? ", W packed before" : "") +
                                 (in_pieces ? ", in pieces" : "");
        report_.compare(y, y_, what.c_str());
        if (needs_z_) report_.compare(z, z_, (what + ": z").c_str());
        report_.check(w.is_alone(), what.c_str(), "writes before W");
        check_scratch(scratch, what.c_str());
      }
  }

  // Of all samples at once, or in parts, whose sums are kept between; dW is stored, or W updated by it.
  void tiled_backward(bool in_parts, bool updates) {
    const std::string what = std::string("backward in tiles") + (in_parts ? ", in parts" : "");
    const double numbers[Optimizers::max_parameters] = {0.25};
    const Optimizer sgd = choose(Optimizers{}, index_of("sgd", Optimizers{}), numbers);
    Array<S> new_w(N_, K_), dx(M_, K_, gap_), other_dx(M_, K_, gap_), dw(N_, K_), db(1, N_);
    new_w.fill([&](int64_t n, int64_t k) { return w_(n, k); });
    const Update update{new_w.data(), {}, &sgd};
    Panels w = panels(K_, N_);
    for (const Range columns : panels_of(K_, in_parts)) tile_kernels_.pack_b(w_.in(), columns, N_, w.data());
    Array<float> partial(N_, K_), sums(1, N_);
    Array<double> totals(1, N_);
    totals.fill([](int64_t, int64_t) { return 0; });
    Scratch scratch(kScratchBytes);
    for (const Range samples : panels_of(M_, in_parts)) {
      Array<S>* const results[]{&dx, &other_dx};
      const auto part_of = [&](Array<S>& to) {
        Backward b = problem(&to, dw.data(), nullptr);
        const auto from = [&](auto& m) {
          if (m.data) m.data = const_cast<S*>(static_cast<const S*>(m.data)) + samples.begin * m.stride;
        };
        from(b.dy), from(b.saved), from(b.x), from(b.dx);
        b.M = samples.size();
        b.update_w = updates ? &update : nullptr;
        return b;
      };
      const Backward b = part_of(dx);
      Panels dz = panels(b.M, N_), dz_transposed = panels(N_, b.M), x = panels(K_, b.M);
      for (const Range columns : panels_of(N_, in_parts)) {  // both operands at once, or each alone
        tile_kernels_.pack_grad(b, columns, dz.data(), updates ? nullptr : dz_transposed.data(), totals.data());
        if (updates) tile_kernels_.pack_grad(b, columns, nullptr, dz_transposed.data(), nullptr);
      }
      for (const Range columns : panels_of(K_, in_parts)) tile_kernels_.pack_b(b.x, columns, b.M, x.data());
      const bool first = samples.begin == 0, last = samples.end == M_;
      for (const bool packed_before : {false, true})
        for (const Range rows : panels_of(b.M, in_parts))
          for (const Range columns : panels_of(K_, in_parts))
            tile_kernels_.grad_input(part_of(*results[packed_before]), dz.data(), packed_before ? w.data() : nullptr,
                                     rows, columns, scratch.data());
      for (const Range rows : panels_of(N_, in_parts))
        for (const Range columns : panels_of(K_, in_parts))
          tile_kernels_.grad_weight(b, dz_transposed.data(), x.data(), rows, columns,
                                    first && last ? nullptr : partial.data(), first, last, scratch.data());
      report_.check(dz.is_alone() && dz_transposed.is_alone() && x.is_alone(), what.c_str(), "writes before a panel");
    }
    const Exact dz = rounded_dz(), exact_dw = product({dz, true}, {exactly(x_)}, N_, M_, K_);
    const Exact exact_dx = product({dz}, {exactly(w_)}, M_, N_, K_);
    report_.compare(dx, exact_dx, (what + ": dx").c_str());
    report_.compare(other_dx, exact_dx, (what + ": dx, W packed before").c_str());
    if (updates) {
      Exact updated = exactly(w_);
      for (size_t i = 0; i < updated.values.size(); ++i) updated.values[i] -= 0.25 * exact_dw.values[i];
      updated.terms += exact_dw.terms;
      report_.compare(new_w, updated, (what + ": update of W").c_str());
    } else {
      report_.compare(dw, exact_dw, (what + ": dW").c_str());
    }
    tile_kernels_.round_db(totals.data(), N_, sums.data());
    kernels_.combine(sums.data(), 1, N_, {0, N_}, db.data());
    report_.compare(db, db_, (what + ": db").c_str());
    report_.check(totals.is_alone() && sums.is_alone() && partial.is_alone(), what.c_str(), "writes past its sums");
    check_scratch(scratch, what.c_str());
  }
  Exact rounded_dz() const {  // tiles take dz in bfloat16
    Exact dz = dz_;
    for (double& v : dz.values) v = value(rounded<S>(v));
    return dz;
  }

  Report& report_;
  const int64_t M_, K_, N_, gap_;
  const Activation activation_;
  const bool needs_z_;
  bool has_bias_;
  Random random_;
  Array<S> x_, w_, bias_, dy_, saved_;
  Exact z_, y_, dz_, dx_, dw_, db_;
  const LayerKernels& kernels_ = TARGET::layer_kernels(Format<S>::dtype);
  const TileKernels& tile_kernels_ = TARGET::tile_kernels();
};

struct Sizes {
  int64_t M, K, N;
};
// Tails of every vector width and tile; no rows, one row, one input, one output.
constexpr Sizes kSmall[] = {{0, 4, 3},  {1, 1, 1},   {1, 7, 1},    {1, 37, 19}, {2, 3, 5},   {3, 0, 4},  {4, 33, 65},
                            {5, 1, 9},  {5, 9, 1},   {7, 2, 15},   {9, 15, 2},  {13, 6, 4},  {23, 5, 3}, {16, 16, 16},
                            {29, 1, 1}, {33, 17, 7}, {140, 1, 31}, {11, 21, 8}, {150, 13, 1}};
// Several blocks of rows, columns and depth in one of the products each.
constexpr Sizes kLarge[] = {{117, 530, 270}, {19, 33, 1040}, {1040, 7, 9}, {500, 24, 35}, {6, 1100, 10}, {9, 1, 4200}};

// Tails of tiles and panels, and several of the blocks that stay in caches, of rows, columns and depth.
constexpr Sizes kTiled[] = {{16, 32, 48},  {17, 31, 33},    {64, 96, 64},     {65, 33, 63},    {1, 64, 16},
                            {97, 15, 130}, {300, 1100, 70}, {40, 1100, 1060}, {300, 70, 1040}, {1040, 70, 300}};

template <class S>
void test(Report& report) {
  const size_t relu = index_of("relu", Activations{}), gelu = index_of("gelu", Activations{});
  for (const auto [M, K, N] : kSmall)
    for (const size_t activation : {relu, index_of("tanh", Activations{}), gelu})
      for (const int64_t gap : {0, 3}) LayerTest<S>(report, M, K, N, activation, gap).run();
  for (size_t activation = 0; activation < Activations::size; ++activation)
    LayerTest<S>(report, 14, 11, 13, activation, 1).run();
  for (const auto [M, K, N] : kLarge)
    for (const size_t activation : {relu, gelu}) LayerTest<S>(report, M, K, N, activation, activation == relu).run();
}

}  // namespace

void test_layers(Report& report) {
  test<float>(report);
  test<double>(report);
  test<BFloat16>(report);
  for (const auto [M, K, N] : kTiled)
    for (const std::string name : {"gelu", "relu"})
      if (name == "gelu" || M * K * N < 1 << 20)
        LayerTest<BFloat16>(report, M, K, N, index_of(name, Activations{}), M % 2 ? 5 : 0).tiles();
  test<Half>(report);
}

}  // namespace mlp_ext::cpu
