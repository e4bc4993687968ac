// mlp_train_step_ on the CPU: narrow networks by blocks of rows through all layers, others layer by layer. Arguments
// are checked and plans made once for all batches.
#include "cpu/train.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <torch/library.h>

#include "cpu/caching_allocator.h"
#include "cpu/layer.h"
#include "cpu/plan.h"
#include "cpu/updates.h"
#include "cpu/variants.h"
#include "ops/checks.h"

namespace mlp_ext::cpu {

namespace {

constexpr int64_t kGatheredBytes = int64_t(8) << 20;  // of input gathered at a time, in whole batches

// Runs f(piece, valid) for all pieces and sums the losses; throws if a piece was not valid.
template <class F>
double sum_losses(int64_t pieces, const F& f) {
  c10::SmallVector<double, 16> losses(pieces, 0.0);
  c10::SmallVector<char, 16> valid(pieces, true);
  for_pieces(pieces, [&](int64_t i) {
    bool all = true;
    losses[i] = f(i, all);
    valid[i] = all;
  });
  if (std::find(valid.begin(), valid.end(), false) != valid.end()) throw_not_a_probability();
  double total = 0;
  for (const double loss : losses) total += loss;
  return total;
}

const void* data(const TrainedParameter& p) { return p.value ? p.value->const_data_ptr() : nullptr; }

// The unscaled sum of the losses of outputs y, and their gradient into dy. y, dy: [M, N], contiguous.
double sum_losses(const Loss& loss, const void* y, void* dy, int64_t M, int64_t N, DType dtype) {
  const int64_t pieces = std::clamp<int64_t>(M * N / limits_of(dtype).elements_per_thread, 1, threads());
  return sum_losses(pieces, [&](int64_t i, bool& valid) {
    return variant().step_kernels(dtype).loss(loss, piece(i, pieces, M), N, y, dy,
                                              scratch((3 * kLossRows + 1) * N * accumulator_size(dtype)), valid);
  });
}

// A training step for batches of one size. Its constructor takes all the memory of a step: one that runs out of memory
// must not have updated some parameters.
class BatchStep {
 public:
  BatchStep(const Training& training, const Updates& updates, int64_t M)
      : training_(training),
        updates_(updates),
        M_(M),
        K_(training.input.size(1)),
        N_(training.layers.back().weight.value->size(0)),
        dtype_(dtype_of(training.input)),
        kernels_(variant().step_kernels(dtype_)),
        limits_(limits_of(dtype_)) {
    const auto widths = training.widths();
    plan_ = make_step_plan(M_, {widths.data(), widths.size()}, item_size(dtype_), threads(), dot_mode_of(dtype_),
                           machine());
    if (plan_.path == StepPath::lanes) {
      scratch_bytes_of_ = variant().lane_kernels(dtype_)->rows_scratch_bytes;
      rows_ = variant().lane_kernels(dtype_)->rows;
    }
    if (!is_by_rows()) static_cast<void>(scratch(kScratchBytes));
    is_by_rows() ? prepare_rows() : plan_.path == StepPath::panels ? prepare_panels() : prepare_layers();
  }

  int64_t rows() const { return M_; }
  bool takes_threads() const { return plan_.pieces > 1; }
  // Whether it runs in a region: on several threads, without torch's GEMMs.
  bool in_one_region() const {
    if (!takes_threads()) return false;
    if (plan_.path != StepPath::layers) return true;
    for (const TrainedLayer& layer : training_.layers) {
      const at::Tensor& w = *layer.weight.value;
      const bool learns = layer.weight.optimizer || layer.bias.optimizer;
      if (takes_library(M_, w.size(1), w.size(0), dtype_, learns)) return false;
    }
    return true;
  }

  // Runs one step; returns the unscaled sum of the losses.
  double run(const ConstMatrix& x, const Loss& loss) {
    return is_by_rows() ? by_rows(x, loss) : plan_.path == StepPath::panels ? by_panels(x, loss) : by_layers(x, loss);
  }

 private:
  bool is_by_rows() const { return plan_.path == StepPath::lanes || plan_.path == StepPath::blocks; }

  void* allocate(int64_t elements, at::ScalarType type) {
    return memory_.emplace_back(empty_cached({elements}, type)).mutable_data_ptr();
  }

  void prepare_rows() {
    const auto take = [&](size_t l, bool bias, const TrainedParameter& p) {
      const int64_t begin = sums_size_;
      if (!updates_.of(l, bias)) return int64_t(-1);
      sums_size_ += p.value->numel();
      return begin;
    };
    for (size_t l = 0; l < training_.layers.size(); ++l) {
      const TrainedLayer& layer = training_.layers[l];
      const at::Tensor& w = *layer.weight.value;
      const int64_t dw = take(l, false, layer.weight), db = take(l, true, layer.bias);
      views_.push_back(
          {w.size(1), w.size(0), {w.const_data_ptr(), w.size(1)}, data(layer.bias), &layer.activation, dw, db});
    }
    if (plan_.pieces > 1) {
      const DType accumulator = dtype_ == DType::float64 ? dtype_ : DType::float32;
      sums_ = allocate(plan_.pieces * sums_size_, scalar_type(accumulator));
    }
    scratch_bytes_ = ceil_div(scratch_bytes_of_(problem({}, {})), kCacheLine) * kCacheLine;
  }
  StepProblem problem(const ConstMatrix& x, const Loss& loss) const {
    return {x, {views_.data(), views_.size()}, training_.lowest_learning, sums_size_, &limits_, loss};
  }

  // Each thread takes a range of rows and has its own accumulators, which are added in order.
  double by_rows(const ConstMatrix& x, const Loss& loss) {
    const int64_t pieces = plan_.pieces, bytes = sums_size_ * accumulator_size(dtype_);  // accumulators of a piece
    const StepProblem p = problem(x, loss);
    std::optional<Scratch> alone;  // of one piece, with its accumulators behind
    if (pieces == 1) alone.emplace(scratch(scratch_bytes_ + bytes));
    char* const sums = alone ? alone->data() + scratch_bytes_ : static_cast<char*>(sums_);
    const double total = sum_losses(pieces, [&](int64_t i, bool& valid) {
      const auto run = [&](void* own) { return rows_(p, piece(i, pieces, M_), sums + i * bytes, own, valid); };
      return alone ? run(*alone) : run(scratch(scratch_bytes_));
    });
    const auto finish = [&](const Update* update, const TrainedParameter& parameter, int64_t begin) {
      if (!update) return;
      const auto piece = [&](int64_t from, int64_t to) {
        kernels_.update(*update, sums + begin * accumulator_size(dtype_), pieces, sums_size_, {from, to});
      };
      const int64_t size = parameter.value->numel(), each = ceil_div(limits_.elements_per_thread, pieces);
      for_ranges(size, each, piece);
    };
    for (size_t l = training_.lowest_learning; l < views_.size(); ++l) {
      finish(updates_.of(l, false), training_.layers[l].weight, views_[l].dw);
      finish(updates_.of(l, true), training_.layers[l].bias, views_[l].db);
    }
    return total;
  }

  // Allocates the layers' panels.
  void prepare_panels() {
    panel_width_ = variant().panel_kernels(dtype_)->width();
    int64_t widest = K_, features = K_;
    for (const TrainedLayer& layer : training_.layers) {
      const int64_t N = layer.weight.value->size(0);
      const bool keeps_z = &layer != &training_.layers.back() && needs_of(layer.activation) == Needs::preactivation;
      widest = std::max(widest, N);
      features += keeps_z ? 2 * N : N;
    }
    const int64_t rows = ceil_div(M_, panel_width_) * panel_width_, size = item_size(dtype_);
    auto* free = static_cast<char*>(allocate(rows * (features + 2 * widest), training_.input.scalar_type()));
    const auto take = [&](int64_t F) { return std::exchange(free, free + rows * F * size); };
    char *const input = take(K_), *const gradients[] = {take(widest), take(widest)};
    for (size_t l = 0; l < training_.layers.size(); ++l) {
      const TrainedLayer& layer = training_.layers[l];
      const at::Tensor& w = *layer.weight.value;
      const bool top = l + 1 == training_.layers.size();  // its activation is applied by the loss kernel
      const PanelLayer* const below = l > 0 ? &panels_[l - 1] : nullptr;
      PanelLayer p{};
      p.M = M_;
      p.K = w.size(1);
      p.N = w.size(0);
      p.w = {w.const_data_ptr(), p.K};
      p.bias = data(layer.bias);
      p.activation = top ? &identity_ : &layer.activation;
      p.activation_below = below ? &training_.layers[l - 1].activation : nullptr;
      p.x = below ? below->y : input;
      p.y = take(p.N);
      p.z = needs_of(*p.activation) == Needs::preactivation ? take(p.N) : nullptr;
      p.dz = gradients[l % 2];
      p.saved_below = below && below->z ? below->z : p.x;
      p.dz_below = l > training_.lowest_learning ? gradients[(l + 1) % 2] : nullptr;
      p.update_w = updates_.of(l, false);
      p.update_b = updates_.of(l, true);
      panels_.push_back(p);
    }
  }

  // Layer by layer. Forward is split over rows of W, backward over columns of W: the thread that read a block of
  // columns for dx updates it in place. The lowest layer that learns has no dx, so its dW is split over rows and x is
  // used unpacked.
  double by_panels(const ConstMatrix& x, const Loss& loss) {
    const PanelKernels& kernels = *variant().panel_kernels(dtype_);
    const int64_t panels = ceil_div(M_, panel_width_);
    const auto pieces_of = [](int64_t work, int64_t of_a_thread, int64_t most) {
      return std::clamp<int64_t>(work / of_a_thread, 1, std::max<int64_t>(1, std::min(most, threads())));
    };
    const auto rows_piece = [&](int64_t i, int64_t n) {
      return Range{i * panels / n * panel_width_, std::min(M_, (i + 1) * panels / n * panel_width_)};
    };

    panels_[0].rows_of_x = x;
    const int64_t input_pieces = pieces_of(M_ * K_, limits_.elements_per_thread, panels);
    for_pieces(input_pieces,
               [&](int64_t i) { kernels.input(x, rows_piece(i, input_pieces), K_, const_cast<void*>(panels_[0].x)); });
    for (const PanelLayer& l : panels_) {
      const Grid grid =
          cut(l.N, M_, pieces_of(M_ * l.K * l.N, limits_.multiply_adds_per_thread, threads()), kPanelPacking);
      for_pieces(grid.size(), [&](int64_t i) {
        const Range rows = rows_piece(i / grid.rows, grid.columns);
        if (rows.size() > 0)
          kernels.forward(l, piece_of_lines(i % grid.rows, grid.rows, l.N), rows, scratch(kScratchBytes));
      });
    }
    const int64_t loss_pieces = pieces_of(M_ * N_, limits_.elements_per_thread, panels);
    const double total = sum_losses(loss_pieces, [&](int64_t i, bool& valid) {
      return kernels.loss(loss, panels_.back(), training_.layers.back().activation, rows_piece(i, loss_pieces),
                          scratch(kScratchBytes), valid);
    });
    for (size_t l = panels_.size(); l-- > training_.lowest_learning;) {
      const PanelLayer& layer = panels_[l];
      const bool by_rows = !layer.dz_below && layer.N > layer.K / 2;
      const int64_t pieces = pieces_of(2 * M_ * layer.K * layer.N, limits_.multiply_adds_per_thread,
                                       (by_rows ? layer.N : layer.K) / limits_.panel_columns);
      for_pieces(pieces, [&](int64_t i) {
        const Range rows = piece_of_lines(i, pieces, layer.N), columns = piece_of_lines(i, pieces, layer.K);
        kernels.backward(layer, by_rows ? rows : Range{0, layer.N}, by_rows ? Range{0, layer.K} : columns, rows,
                         scratch(kScratchBytes));
      });
    }
    return total;
  }

  // Allocates the layers' outputs and gradients. dy of a layer and of the next one are in two buffers in turn.
  void prepare_layers() {
    const auto type = training_.input.scalar_type();
    const size_t L = training_.layers.size(), lowest = training_.lowest_learning;
    const auto rows = [&](int64_t columns) { return Matrix{allocate(M_ * columns, type), columns}; };
    const auto read = [](const Matrix& m) { return ConstMatrix{m.data, m.stride}; };
    const auto width = [&](size_t l) { return training_.layers[l].weight.value->size(0); };
    int64_t widest[2] = {};
    for (size_t l = lowest; l < L; ++l) widest[l % 2] = std::max(widest[l % 2], width(l));
    void* const dys[] = {rows(widest[0]).data, rows(widest[1]).data};
    for (size_t l = 0; l < L; ++l) {
      const TrainedLayer& layer = training_.layers[l];
      const int64_t K = l > 0 ? width(l - 1) : K_, N = width(l);
      const bool needs_z = l >= lowest && needs_of(layer.activation) == Needs::preactivation;
      const ConstMatrix x = l > 0 ? read(layers_[l - 1].forward.y) : ConstMatrix{};
      const ConstMatrix w{layer.weight.value->const_data_ptr(), K};
      const Matrix y = rows(N), z = needs_z ? rows(N) : Matrix{}, dx{l > lowest ? dys[(l - 1) % 2] : nullptr, K};
      Backward backward{M_, K,  N,       {dys[l % 2], N}, read(needs_z ? z : y), x,
                        w,  dx, nullptr, nullptr,         &layer.activation};
      backward.update_w = K > 0 ? updates_.of(l, false) : nullptr;
      backward.update_b = updates_.of(l, true);
      layers_.push_back({{M_, K, N, x, w, data(layer.bias), y, z, &layer.activation}, backward});
    }
    // What allocates may run out of memory, so layers above the last one that does are updated afterwards.
    size_t l = lowest;
    while (l < L && !backward_allocates(layers_[l].backward, dtype_)) ++l;
    for (++l; l < L; ++l) {
      Backward& b = layers_[l].backward;
      if (std::exchange(b.update_w, nullptr)) b.dw = allocate(b.N * b.K, type);
      if (std::exchange(b.update_b, nullptr)) b.db = allocate(b.N, type);
    }
    int64_t bytes = 0;
    for (l = lowest; l < L; ++l) bytes = std::max(bytes, backward_bytes(layers_[l].backward, dtype_));
    if (bytes > 0) sums_ = allocate(bytes, at::kByte);
  }

  // The kernels of linear_act, one layer after another; W is updated in the epilogue of dW.
  double by_layers(const ConstMatrix& x, const Loss& loss) {
    layers_[0].forward.x = layers_[0].backward.x = x;
    for (const Layer& l : layers_)
      if (l.forward.M > 0 && l.forward.N > 0) forward_layer(l.forward, dtype_);
    const Layer& top = layers_.back();
    const double total = sum_losses(loss, top.forward.y.data, const_cast<void*>(top.backward.dy.data), M_, N_, dtype_);
    for (size_t l = layers_.size(); l-- > training_.lowest_learning;)
      backward_layer(layers_[l].backward, dtype_, sums_);
    for (size_t l = training_.lowest_learning; l < layers_.size(); ++l) {
      const Backward& b = layers_[l].backward;
      if (b.dw) update_with(*updates_.of(l, false), b.dw, b.N * b.K, dtype_);
      if (b.db) update_with(*updates_.of(l, true), b.db, b.N, dtype_);
    }
    return total;
  }

  struct Layer {
    Forward forward;
    Backward backward;
  };
  const Training& training_;
  const Updates& updates_;
  const int64_t M_, K_, N_;
  const DType dtype_;
  const StepKernels& kernels_;
  const Limits& limits_;
  const Activation identity_ = choose(Activations{}, index_of(Identity::name, Activations{}), nullptr);
  decltype(StepKernels::scratch_bytes) scratch_bytes_of_ = kernels_.scratch_bytes;
  decltype(StepKernels::rows) rows_ = kernels_.rows;  // of blocks or lanes
  StepPlan plan_;
  c10::SmallVector<at::Tensor, 8> memory_;
  void* sums_ = nullptr;  // accumulators: by rows, of all threads; by layers, of one layer
  c10::SmallVector<StepLayerView, 8> views_;
  int64_t sums_size_ = 0;  // accumulators of all gradients
  size_t scratch_bytes_ = 0;
  c10::SmallVector<PanelLayer, 8> panels_;
  int64_t panel_width_ = 0;
  c10::SmallVector<Layer, 8> layers_;
};

// Input, target and loss weight as the kernels take them.
class Rows {
 public:
  Rows(const Training& training, const at::Tensor& input, const at::Tensor& target)
      : training_(training), N_(training.layers.back().weight.value->size(0)), x_(unit_stride(input)) {
    loss_.function = &training.loss;
    loss_.ignore_index = ignore_index_of(training.loss);
    if (training.target_is_classes) {
      target_ = target;
      loss_.classes = target.const_data_ptr<int64_t>();
      loss_.classes_stride = target.stride(0);
    } else {
      target_ = unit_stride(target);
      loss_.target = {target_.const_data_ptr(), target_.stride(0)};
    }
    weight_ = weight_row(training);
    if (weight_.defined()) loss_.weight = weight_.const_data_ptr();
    item_ = static_cast<int64_t>(input.element_size());
  }

  ConstMatrix x(int64_t begin) const {
    return {static_cast<const char*>(x_.const_data_ptr()) + begin * x_.stride(0) * item_, x_.stride(0)};
  }
  // The loss of rows [begin, begin + M). A mean divides by the number of elements or rows, or the sum of class weights.
  Loss loss(int64_t begin, int64_t M) const {
    Loss loss = loss_;
    double count = static_cast<double>(M);
    if (loss.classes) {
      loss.classes += begin * loss.classes_stride;
      count = weight_of_classes(loss, M);
    } else {
      loss.target.data = static_cast<const char*>(loss.target.data) + begin * loss.target.stride * item_;
      if (!is_of_rows_loss(training_.loss) || N_ == 0) count *= static_cast<double>(N_);  // a mean of none is NaN
    }
    loss.scale = training_.mean ? 1 / count : 1;
    return loss;
  }

 private:
  // Checks the target's classes and sums their weights.
  double weight_of_classes(const Loss& loss, int64_t M) const {
    at::Tensor weights;
    if (training_.loss_weight) weights = weight_.to(at::kDouble);
    const double* const w = training_.loss_weight ? weights.const_data_ptr<double>() : nullptr;
    double total = 0;
    for (int64_t m = 0; m < M; ++m) {
      const int64_t c = loss.classes[m * loss.classes_stride];
      if (c == loss.ignore_index) continue;
      if (c < 0 || c >= N_) check_classes(training_, training_.target);  // throws
      total += w ? w[c] : 1;
    }
    return total;
  }

  const Training& training_;
  const int64_t N_;
  at::Tensor x_, target_, weight_;
  Loss loss_;
  int64_t item_;
};

// By a pointer, since an operator may fail, and the parameters are updated.
void put(const at::Tensor& losses, int64_t i, double loss) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, losses.scalar_type(), "put",
                                  [&] { losses.mutable_data_ptr<scalar_t>()[i] = static_cast<scalar_t>(loss); });
}

// The rows of t at these indices. On one thread, since at::index_select would wake others and may wait for a busy core.
at::Tensor gather(const at::Tensor& t, const at::Tensor& order, bool takes_threads) {
  if (takes_threads || !has_unit_stride(t)) return at::index_select(t, 0, order);
  c10::SmallVector<int64_t, 3> sizes(t.sizes().begin(), t.sizes().end());
  sizes[0] = order.size(0);
  at::Tensor out = empty_cached(sizes, t.scalar_type());
  const auto item = static_cast<int64_t>(t.element_size());
  const int64_t row_bytes = item * (t.dim() > 1 ? t.size(1) : 1), stride = item * t.stride(0);
  const char* const from = static_cast<const char*>(t.const_data_ptr());
  char* const to = static_cast<char*>(out.mutable_data_ptr());
  const at::Tensor indices = order.contiguous();
  const int64_t* const rows = indices.const_data_ptr<int64_t>();
  for (int64_t i = 0, run = 1; i < sizes[0]; i += run, run = 1) {
    TORCH_CHECK_INDEX(rows[i] >= 0 && rows[i] < t.size(0), "mlp_train_step_: order has ", rows[i], ", input has ",
                      t.size(0), " rows");
    // Rows in their own order, as of a full batch that is repeated, are copied at once.
    const int64_t most = stride == row_bytes ? std::min(sizes[0] - i, t.size(0) - rows[i]) : 1;
    while (run < most && rows[i + run] == rows[i] + run) ++run;
    std::memcpy(to + i * row_bytes, from + rows[i] * stride, run * row_bytes);
  }
  return out;
}

LossAndGrad loss_and_grad(const Training& training, const at::Tensor& y) {
  const Rows source(training, training.input, training.target);
  const Loss loss = source.loss(0, y.size(0));
  const at::Tensor outputs = y.contiguous(), dy = empty_cached(y.sizes(), y.scalar_type());
  LossAndGrad result{at::empty({}, y.options()), dy};
  const double total =
      sum_losses(loss, outputs.const_data_ptr(), dy.mutable_data_ptr(), y.size(0), y.size(1), dtype_of(y));
  put(result.loss, 0, total * loss.scale);
  return result;
}

at::Tensor step_by_layers(const Training& training) {
  return mlp_ext::step_by_layers(training, {loss_and_grad, update, cast});
}

}  // namespace

at::Tensor train(const Training& training) {
  if (training.autocast || !training.dropout.empty()) return loop_over_batches(training, step_by_layers);
  bool on_cpu = is_contiguous(training);
  for_learning(training, [&](const TrainedParameter& p) { on_cpu = on_cpu && (!p.step || p.step->is_cpu()); });
  if (!on_cpu) return train_native(training);
  const int64_t rows = training.rows(), most = std::max<int64_t>(1, rows);
  const int64_t batch = training.batch_size ? std::min(*training.batch_size, most) : most;
  const int64_t steps = training.batch_size ? ceil_div(rows, batch) : 1;
  at::Tensor losses =
      training.batch_size ? at::empty({steps}, training.input.options()) : at::empty({}, training.input.options());
  if (steps == 0) return losses;

  Updates updates(training);
  std::optional<BatchStep> step;
  const auto prepare = [&](int64_t M) {
    if (!step || step->rows() != M) step.emplace(training, updates, M);
  };
  const auto run = [&](const Rows& source, int64_t begin, int64_t M, int64_t i) {
    prepare(M);
    const Loss loss = source.loss(begin, M);
    updates.begin_step();
    put(losses, i, step->run(source.x(begin), loss) * loss.scale);
    updates.end_step();
  };

  const int64_t row_bytes = std::max<int64_t>(1, training.input.size(1) * training.input.element_size());
  const int64_t chunk = training.order ? std::max<int64_t>(1, kGatheredBytes / row_bytes / batch) * batch : most;
  for (int64_t first = 0, i = 0; i < steps; first += chunk) {
    const int64_t size = std::min(chunk, rows - first);
    prepare(std::min(batch, size));
    const auto part = [&](const at::Tensor& t) {
      return training.order ? gather(t, training.order->narrow(0, first, size), step->takes_threads()) : t;
    };
    const Rows source(training, part(training.input), part(training.target));
    in_region_if(step->in_one_region(), [&] {
      int64_t begin = 0;
      do {
        run(source, begin, std::min(batch, size - begin), i++);
        begin += batch;
      } while (begin < size);
    });
  }
  return losses;
}

TORCH_LIBRARY_IMPL(mlp_ext, CPU, m) {
  m.impl("mlp_train_step_", train_kernel<train>);
  m.impl("mlp_train_update_", update_kernel<update>);
}

}  // namespace mlp_ext::cpu
