// mlp_sgd_step_ on the CPU: all layers block of rows by block of rows where the network is narrow, else layer by layer.
#include "ops/train.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/caching_allocator.h"
#include "cpu/layer.h"
#include "cpu/plan.h"
#include "cpu/variants.h"
#include "math/losses.h"
#include "ops/checks.h"

namespace mlp_ext::cpu {

namespace {

// The sum over pieces of f(piece, valid): the loss of its rows, and whether all were valid.
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

class CpuStep {
 public:
  explicit CpuStep(const Step& step)
      : step_(step),
        M_(step.input.size(0)),
        N_(step.layers.back().weight.value->size(0)),
        dtype_(dtype_of(step.input)),
        kernels_(variant().step_kernels(dtype_)) {}

  at::Tensor run() {
    loss_ = loss();
    c10::SmallVector<int64_t, 9> widths{step_.input.size(1)};
    for (const StepLayer& layer : step_.layers) widths.push_back(layer.weight.value->size(0));
    const StepPlan plan =
        make_step_plan(M_, {widths.data(), widths.size()}, item_size(dtype_), threads(), dot_mode_of(dtype_));
    const double sum = plan.path == StepPath::blocks   ? by_blocks(plan.pieces)
                       : plan.path == StepPath::panels ? by_panels()
                                                       : by_layers();
    return result(sum * loss_.scale);
  }

 private:
  // The loss as the kernels take it. Of the mean, what it is divided by: elements, rows, or their classes' weights.
  Loss loss() {
    Loss loss;
    loss.index = step_.loss;
    const at::Tensor& target = step_.target;
    double count = static_cast<double>(M_);
    if (step_.target_is_classes) {
      loss.classes = target.const_data_ptr<int64_t>();
      loss.classes_stride = target.stride(0);
      count = classes_weight(loss);
    } else {
      rows_of_target_ = target.stride(1) == 1 || N_ == 1 ? target : target.contiguous();
      loss.target = {rows_of_target_.const_data_ptr(), rows_of_target_.stride(0)};
      if (step_.loss != kCrossEntropy) count *= static_cast<double>(N_);
    }
    if (step_.loss_weight) {
      weight_ = step_.loss_weight->contiguous();
      loss.weight = weight_.const_data_ptr();
    }
    loss.ignore_index = step_.ignore_index;
    loss.label_smoothing = step_.label_smoothing;
    loss.scale = step_.mean ? 1 / count : 1;
    return loss;
  }

  // The sum of the weights of the target's classes, which are checked.
  double classes_weight(const Loss& loss) const {
    at::Tensor weights;
    if (step_.loss_weight) weights = step_.loss_weight->to(at::kDouble).contiguous();
    const double* const w = step_.loss_weight ? weights.const_data_ptr<double>() : nullptr;
    double total = 0;
    for (int64_t m = 0; m < M_; ++m) {
      const int64_t c = loss.classes[m * loss.classes_stride];
      if (c == step_.ignore_index) continue;
      if (c < 0 || c >= N_) check_classes(step_);  // throws
      total += w ? w[c] : 1;
    }
    return total;
  }

  at::Tensor result(double loss) const {
    const at::Tensor result = at::empty({}, step_.input.options());
    if (dtype_ == DType::float32)
      *result.mutable_data_ptr<float>() = static_cast<float>(loss);
    else
      result.fill_(loss);
    return result;
  }

  static std::optional<Update> update(const StepParameter& p) {
    if (!p.sgd) return std::nullopt;
    return Update{p.value->mutable_data_ptr(), p.momentum_buffer ? p.momentum_buffer->mutable_data_ptr() : nullptr,
                  &*p.sgd};
  }
  static const void* data(const StepParameter& p) { return p.value ? p.value->const_data_ptr() : nullptr; }

  // Each thread takes some rows, block by block through all layers, and has sums of its own, added up in order.
  double by_blocks(int64_t pieces) {
    const at::Tensor& input = step_.input;
    const at::Tensor x = input.stride(1) == 1 || input.size(1) == 1 ? input : input.contiguous();
    c10::SmallVector<StepLayerView, 8> layers;
    int64_t size = 0;
    const auto take = [&size](const StepParameter& p) {
      const int64_t begin = size;
      if (p.sgd) size += p.value->numel();
      return p.sgd ? begin : -1;
    };
    for (const StepLayer& layer : step_.layers) {
      const at::Tensor& w = *layer.weight.value;
      layers.push_back({w.size(1),
                        w.size(0),
                        {w.const_data_ptr(), w.size(1)},
                        data(layer.bias),
                        layer.activation,
                        take(layer.weight),
                        take(layer.bias)});
    }
    const StepProblem problem{
        {x.const_data_ptr(), x.stride(0)}, {layers.data(), layers.size()}, step_.lowest_learning, size, loss_};
    const int64_t bytes = size * accumulator_size(dtype_);  // of the sums of a piece
    const DType accumulator = dtype_ == DType::float64 ? dtype_ : DType::float32;
    const at::Tensor shared = pieces > 1 ? empty_cached({pieces * size}, scalar_type(accumulator)) : at::Tensor();
    char* sums = pieces > 1 ? static_cast<char*>(shared.mutable_data_ptr()) : nullptr;
    const int64_t scratch_bytes = ceil_div(kernels_.scratch_bytes(problem), kCacheLine) * kCacheLine;
    const double total = sum_losses(pieces, [&](int64_t i, bool& valid) {
      char* const own = static_cast<char*>(scratch(scratch_bytes + (pieces > 1 ? 0 : bytes)));
      if (pieces == 1) sums = own + scratch_bytes;
      return kernels_.rows(problem, piece(i, pieces, M_), sums + i * bytes, own, valid);
    });
    const auto finish = [&](const StepParameter& p, int64_t begin) {
      if (const auto u = update(p))
        at::parallel_for(0, p.value->numel(), ceil_div(kElementsPerThread, pieces), [&](int64_t from, int64_t to) {
          kernels_.update(*u, sums + begin * accumulator_size(dtype_), pieces, size, {from, to});
        });
    };
    for (size_t l = step_.lowest_learning; l < layers.size(); ++l) {
      finish(step_.layers[l].weight, layers[l].dw);
      finish(step_.layers[l].bias, layers[l].db);
    }
    return total;
  }

  // The layers with memory for their panels, of which `width` rows each.
  struct PanelLayers {
    at::Tensor memory;
    c10::SmallVector<PanelLayer, 8> layers;
  };
  PanelLayers panel_layers(const ConstMatrix& x, int64_t K, int64_t width) const {
    const auto dtype = step_.input.scalar_type();
    int64_t widest = K, features = K;
    for (const StepLayer& layer : step_.layers) {
      const int64_t N = layer.weight.value->size(0);
      widest = std::max(widest, N);
      features += N;
    }
    const int64_t rows = ceil_div(M_, width) * width, size = item_size(dtype_);
    PanelLayers result{empty_cached({rows * (features + 2 * widest)}, dtype), {}};
    char* free = static_cast<char*>(result.memory.mutable_data_ptr());
    const auto take = [&](int64_t F) { return std::exchange(free, free + rows * F * size); };
    char *const input = take(K), *const gradients[] = {take(widest), take(widest)};
    for (size_t l = 0; l < step_.layers.size(); ++l) {
      const StepLayer& layer = step_.layers[l];
      const at::Tensor& w = *layer.weight.value;
      const bool top = l + 1 == step_.layers.size();  // its activation goes with the loss
      PanelLayer p{};
      p.M = M_;
      p.K = w.size(1);
      p.N = w.size(0);
      p.w = {w.const_data_ptr(), p.K};
      p.bias = data(layer.bias);
      p.activation = top ? activation_index(Identity::name) : layer.activation;
      p.activation_below = l > 0 ? step_.layers[l - 1].activation : 0;
      p.x = l > 0 ? result.layers[l - 1].y : input;
      if (l == 0) p.rows_of_x = x;
      p.y = take(p.N);
      p.dz = gradients[l % 2];
      p.dz_below = l > step_.lowest_learning ? gradients[(l + 1) % 2] : nullptr;
      result.layers.push_back(p);
    }
    return result;
  }

  // Layer by layer. Forward is split over rows of W, backward over columns of W: the thread that read a block of
  // columns for dx updates it in place. The lowest layer that learns has no dx, so its dW is split over rows and x is
  // used unpacked.
  double by_panels() {
    const PanelKernels& kernels = *variant().panel_kernels(dtype_);
    const int64_t width = kernels.width(), panels = ceil_div(M_, width);
    const auto pieces_of = [](int64_t work, int64_t of_a_thread, int64_t most) {
      return std::clamp<int64_t>(work / of_a_thread, 1, std::max<int64_t>(1, std::min(most, threads())));
    };
    const auto rows_piece = [&](int64_t i, int64_t n) {
      return Range{i * panels / n * width, std::min(M_, (i + 1) * panels / n * width)};
    };

    const at::Tensor x = step_.input.stride(1) == 1 ? step_.input : step_.input.contiguous();
    const int64_t K = x.size(1);
    const ConstMatrix rows_of_x{x.const_data_ptr(), x.stride(0)};
    PanelLayers memory_and_layers = panel_layers(rows_of_x, K, width);
    auto& layers = memory_and_layers.layers;

    const int64_t input_pieces = pieces_of(M_ * K, kElementsPerThread, panels);
    for_pieces(input_pieces, [&](int64_t i) {
      kernels.input(rows_of_x, rows_piece(i, input_pieces), K, const_cast<void*>(layers[0].x));
    });
    for (const PanelLayer& l : layers) {
      const Grid grid = cut(l.N, M_, pieces_of(M_ * l.K * l.N, kMultiplyAddsPerThread, threads()), kPanelPacking);
      for_pieces(grid.size(), [&](int64_t i) {
        const Range rows = rows_piece(i / grid.rows, grid.columns);
        if (rows.size() > 0)
          kernels.forward(l, piece_of_lines(i % grid.rows, grid.rows, l.N), rows, scratch(kScratchBytes));
      });
    }
    const int64_t loss_pieces = pieces_of(M_ * N_, kElementsPerThread, panels);
    const double total = sum_losses(loss_pieces, [&](int64_t i, bool& valid) {
      return kernels.loss(loss_, layers.back(), step_.layers.back().activation, rows_piece(i, loss_pieces),
                          scratch(kScratchBytes), valid);
    });
    for (size_t l = layers.size(); l-- > step_.lowest_learning;) {
      PanelLayer& layer = layers[l];
      const auto update_w = update(step_.layers[l].weight), update_b = update(step_.layers[l].bias);
      layer.update_w = update_w ? &*update_w : nullptr;
      layer.update_b = update_b ? &*update_b : nullptr;
      const bool by_rows = !layer.dz_below && layer.N > layer.K / 2;
      const int64_t pieces =
          pieces_of(2 * M_ * layer.K * layer.N, kMultiplyAddsPerThread, (by_rows ? layer.N : layer.K) / kPanelColumns);
      for_pieces(pieces, [&](int64_t i) {
        const Range rows = piece_of_lines(i, pieces, layer.N), columns = piece_of_lines(i, pieces, layer.K);
        kernels.backward(layer, by_rows ? rows : Range{0, layer.N}, by_rows ? Range{0, layer.K} : columns, rows,
                         scratch(kScratchBytes));
      });
    }
    return total;
  }

  // The kernels of linear_act, one layer after the other; the update goes with the last write of dW.
  double by_layers() {
    const auto dtype = step_.input.scalar_type();
    const at::Tensor x = step_.input.contiguous();
    const size_t L = step_.layers.size();
    c10::SmallVector<at::Tensor, 9> rows{x};  // what each layer reads, and the output
    const auto matrix = [](const at::Tensor& t) { return ConstMatrix{t.const_data_ptr(), t.size(1)}; };
    for (const StepLayer& layer : step_.layers) {
      const at::Tensor &w = *layer.weight.value, in = rows.back();
      rows.push_back(empty_cached({M_, w.size(0)}, dtype));
      if (M_ == 0 || w.size(0) == 0) continue;
      forward_layer({M_,
                     w.size(1),
                     w.size(0),
                     matrix(in),
                     matrix(w),
                     data(layer.bias),
                     {rows.back().mutable_data_ptr(), w.size(0)}},
                    dtype_, layer.activation);
    }
    at::Tensor dy = empty_cached({M_, N_}, dtype);
    const int64_t pieces = std::clamp<int64_t>(M_ * N_ / kElementsPerThread, 1, threads());
    const double total = sum_losses(pieces, [&](int64_t i, bool& valid) {
      return kernels_.loss(loss_, piece(i, pieces, M_), N_, rows[L].const_data_ptr(), dy.mutable_data_ptr(),
                           scratch(3 * kLossRows * N_ * accumulator_size(dtype_)), valid);
    });
    for (size_t l = L; l-- > step_.lowest_learning;) {
      const StepLayer& layer = step_.layers[l];
      const at::Tensor& w = *layer.weight.value;
      const int64_t K = w.size(1), N = w.size(0);
      const auto update_w = K ? update(layer.weight) : std::nullopt, update_b = update(layer.bias);
      at::Tensor dx;
      if (l > step_.lowest_learning) dx = empty_cached({M_, K}, dtype);
      Backward b{M_,
                 K,
                 N,
                 matrix(dy),
                 matrix(rows[l + 1]),
                 matrix(rows[l]),
                 matrix(w),
                 {dx.defined() ? dx.mutable_data_ptr() : nullptr, K},
                 nullptr,
                 nullptr};
      b.update_w = update_w ? &*update_w : nullptr;
      b.update_b = update_b ? &*update_b : nullptr;
      backward_layer(b, dtype_, layer.activation);
      dy = dx;
    }
    return total;
  }

  const Step& step_;
  const int64_t M_, N_;
  const DType dtype_;
  const StepKernels& kernels_;
  at::Tensor rows_of_target_, weight_;
  Loss loss_;
};

at::Tensor step(const Step& step) { return is_contiguous(step) ? CpuStep(step).run() : step_native(step); }

}  // namespace

TORCH_LIBRARY_IMPL(mlp_ext, CPU, m) { m.impl("mlp_sgd_step_", checked_step<step>); }

}  // namespace mlp_ext::cpu
