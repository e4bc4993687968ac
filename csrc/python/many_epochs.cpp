#include "python/many_epochs.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/randperm.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace py = pybind11;

namespace mlp_ext {

using at::Tensor;

namespace {

constexpr auto kPerCall = std::chrono::milliseconds(15);  // then signals are handled
// The networks of a call are a multiple of those in a vector's lanes.
constexpr size_t kLanes = 16, kNetworksOnGpu = 1024;
// At most so many slabs train several epochs each before the next slab's turn. The operator checks each network once
// per call, which costs about one step of a small network; more epochs per call spread that.
constexpr size_t kSlabs = 16;
constexpr int64_t kOrderBytes = int64_t(32) << 20;  // of a call, where that holds one epoch of a slab

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

int64_t batch_size_of(const ManyEpochs& epochs, size_t index, int64_t input_rows) {
  return std::min(epochs.batch_size, epochs.rows.empty() ? input_rows : epochs.rows[index].size(0));
}

ManyEpochsRun::ManyEpochsRun(Networks& networks, const StepData& data, const ManyEpochs& epochs, const Recipe& recipe)
    : networks_(networks),
      data_(data),
      epochs_(epochs),
      mean_(recipe.reduction == "mean"),
      // Masks of dropout are drawn by torch's generator, in an order that must not depend on time.
      one_batch_per_call_(!recipe.dropout.empty()),
      input_rows_(data.input.size(-2)),
      slab_unit_(data.input.is_cpu() ? kLanes * at::get_num_threads() : kNetworksOnGpu),
      steps_per_call_(static_cast<double>(slab_unit_)) {
  for (size_t i = 0; i < networks.size(); ++i) {
    const int64_t batch_size = batch_size_of(epochs, networks.index(i), input_rows_);
    if (groups_.empty() || groups_.back().batch_size != batch_size) groups_.push_back({i, i, batch_size, 0});
    const int64_t batches = batch_size == 0 ? 0 : ceil_div(rows_of(i), batch_size);
    groups_.back().end = i + 1;
    groups_.back().batches = std::max(groups_.back().batches, batches);
    longest_ = std::max(longest_, rows_of(i));
    steps_of_epoch_ += batches;
  }
}

int64_t ManyEpochsRun::rows_of(size_t i) const {
  return epochs_.rows.empty() ? input_rows_ : epochs_.rows[networks_.index(i)].size(0);
}

Tensor ManyEpochsRun::run() {
  if (networks_.size() > slab_unit_) networks_.check(data_);  // else the first call checks them all
  for (int64_t epoch = 0, count = 0; epoch < epochs_.count; epoch += count) {
    count = epochs_at_a_time(epochs_.count - epoch);
    losses_.resize((epoch + count) * networks_.size());
    if (epochs_.shuffle && epochs_.generators.empty()) draw_shared(count);
    for (const Group& group : groups_) {
      const size_t size = slab_size(group, count);
      for (size_t begin = group.begin; begin < group.end; begin += size)
        train({group, begin, std::min(begin + size, group.end), epoch, count, {}});
    }
    finish_epochs(epoch, count);
  }
  networks_.rethrow();
  return at::tensor(losses_, at::dtype(at::kDouble)).view({epochs_.count, static_cast<int64_t>(networks_.size())});
}

// ---- how much at a time ----

int64_t ManyEpochsRun::epochs_at_a_time(int64_t left) const {
  if (one_batch_per_call_ || networks_.has_own_first_step(0, networks_.size())) return 1;
  const size_t slabs = std::clamp<size_t>(networks_.size() / slab_unit_, 1, kSlabs);
  const double steps = steps_per_call_ * static_cast<double>(slabs) / std::max<double>(steps_of_epoch_, 1);
  const size_t orders = has_own_orders() ? std::min(networks_.size(), slab_unit_) : epochs_.shuffle ? 1 : 0;
  const int64_t bytes = std::max<int64_t>(1, 8 * longest_ * static_cast<int64_t>(orders));
  return std::clamp<int64_t>(std::min<double>(steps, kOrderBytes / bytes), 1, left);
}

size_t ManyEpochsRun::slab_size(const Group& group, int64_t epochs) const {
  const size_t size = group.end - group.begin;
  if (one_batch_per_call_) return size;
  const double steps = static_cast<double>(epochs) * std::max<double>(group.batches, 1);
  double most = std::min<double>(steps_per_call_ / steps, size);
  if (has_own_orders()) most = std::min<double>(most, kOrderBytes / std::max<int64_t>(1, 8 * longest_ * epochs));
  const size_t slab = std::max(slab_unit_, static_cast<size_t>(most) / kLanes * kLanes);
  const size_t slabs = (size + slab - 1) / slab;  // of about the same size
  return ((size + slabs - 1) / slabs + kLanes - 1) / kLanes * kLanes;
}

void ManyEpochsRun::adapt(int64_t steps, Signals::Clock::duration took) {
  const std::chrono::duration<double> target = kPerCall, measured = took;
  const double fitting = static_cast<double>(steps) * std::min(target / measured, 16.0);
  steps_per_call_ = measured > target ? std::max(fitting, 1.0) : std::max(fitting, steps_per_call_);
}

// ---- rows ----

// A permutation for each number of rows and epoch, drawn as an eager loop draws that of one network.
void ManyEpochsRun::draw_shared(int64_t epochs) {
  shared_.clear();
  std::vector<size_t> positions(networks_.size());  // of the networks as the user gave them
  for (size_t i = 0; i < positions.size(); ++i) positions[networks_.index(i)] = i;
  for (const size_t i : positions) {
    const auto known = [&](const auto& entry) { return entry.first == rows_of(i); };
    if (std::none_of(shared_.begin(), shared_.end(), known))
      shared_.emplace_back(rows_of(i), at::empty({epochs, rows_of(i)}, at::dtype(at::kLong).device(at::kCPU)));
  }
  for (int64_t epoch = 0; epoch < epochs; ++epoch)
    for (auto& [rows, order] : shared_) {
      Tensor row = order.select(0, epoch);
      at::randperm_out(row, rows, std::nullopt);
    }
}

const Tensor& ManyEpochsRun::shared_order(int64_t rows) const {
  return std::find_if(shared_.begin(), shared_.end(), [&](const auto& entry) { return entry.first == rows; })->second;
}

Tensor ManyEpochsRun::own_order(size_t i, int64_t epochs) const {
  const size_t index = networks_.index(i);
  const int64_t n = rows_of(i);
  const int64_t* const own = epochs_.rows.empty() ? nullptr : epochs_.rows[index].const_data_ptr<int64_t>();
  if (!epochs_.shuffle) return epochs_.rows[index].expand({epochs, n}).contiguous();
  Tensor order = at::empty({epochs, n}, at::dtype(at::kLong).device(at::kCPU));
  int64_t* const to = order.mutable_data_ptr<int64_t>();
  const int64_t* from = to;
  if (epochs_.generators.empty()) {
    from = shared_order(n).const_data_ptr<int64_t>();
  } else {
    for (int64_t epoch = 0; epoch < epochs; ++epoch) {
      Tensor row = order.select(0, epoch);
      at::randperm_out(row, n, epochs_.generators[index]);
    }
  }
  for (int64_t k = 0; own && k < epochs * n; ++k) to[k] = own[from[k]];
  return order;
}

std::vector<Tensor> ManyEpochsRun::orders(size_t begin, size_t end, int64_t epochs) const {
  if (!has_own_orders() && !epochs_.shuffle) return {};
  std::vector<Tensor> found(has_own_orders() ? end - begin : 1);
  if (!has_own_orders()) {
    found[0] = shared_order(input_rows_);
  } else {
    const int64_t grain = std::max<int64_t>(1, 4096 / std::max<int64_t>(1, longest_ * epochs));
    at::parallel_for(0, static_cast<int64_t>(found.size()), grain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) found[i] = own_order(begin + i, epochs);
    });
  }
  for (Tensor& order : found) order = order.to(data_.input.device());
  return found;
}

// ---- steps ----

void ManyEpochsRun::train(Slab slab) {
  auto before = Signals::Clock::now();
  slab.orders = orders(slab.begin, slab.end, slab.epochs);
  const int64_t batches = slab.group.batches;
  for (int64_t first = 0, count = 0; first < batches; first += count) {
    if (slab.epochs > 1)
      count = batches;
    else if (one_batch_per_call_ || networks_.has_own_first_step(slab.begin, slab.end))
      count = 1;
    else
      count = std::clamp<int64_t>(steps_per_call_ / static_cast<double>(slab.size()), 1, batches - first);
    train_batches(slab, first, count);
    const auto now = Signals::Clock::now();
    adapt(slab.size() * slab.epochs * count, now - before);
    before = now;
    signals_.check();
  }
}

// Batches first to first + count of each epoch: of all batches, unless the slab has only one epoch.
void ManyEpochsRun::train_batches(const Slab& slab, int64_t first, int64_t count) {
  const int64_t B = slab.group.batch_size, from = first * B;
  const auto part = [&](const Tensor& t, int64_t dim) {
    const int64_t size = std::clamp<int64_t>(t.size(dim) - from, 0, count * B);
    return size == t.size(dim) ? t : t.narrow(dim, std::min(from, t.size(dim)), size);
  };
  std::vector<Tensor> orders;
  StepData data = data_;
  for (const Tensor& order : slab.orders) orders.push_back(part(order, 1));
  if (orders.empty()) {
    data.input = part(data.input, data.input.dim() - 2);
    data.target = part(data.target, data.target.dim() - (data.has_classes() ? 1 : 2));
  }
  // The networks between those that have failed.
  for (size_t begin = slab.begin, end = begin; begin < slab.end; begin = end + 1) {
    for (end = begin; end < slab.end && !networks_.has_failed(end);) ++end;
    if (begin == end) continue;
    const at::TensorList all(orders);
    const auto own = all.size() > 1 ? all.slice(begin - slab.begin, end - begin) : all;
    const Tensor losses = networks_.train(data, {begin, end, own, slab.epochs, B});
    add_losses(losses.to(at::kCPU, at::kDouble).contiguous(), begin, end, slab, first);
  }
}

// losses: [end - begin, epochs * batches], from the first batch on.
void ManyEpochsRun::add_losses(const Tensor& losses, size_t begin, size_t end, const Slab& slab, int64_t first) {
  const double* found = losses.const_data_ptr<double>();
  const int64_t batches = losses.size(1) / slab.epochs, B = slab.group.batch_size;
  for (size_t i = begin; i < end; ++i)
    for (int64_t epoch = 0; epoch < slab.epochs; ++epoch, found += batches) {
      double& total = losses_[(slab.epoch + epoch) * networks_.size() + networks_.index(i)];
      for (int64_t k = 0; k < batches; ++k) {
        const int64_t rows = std::min(B, rows_of(i) - (first + k) * B);
        if (rows > 0) total += found[k] * (mean_ ? static_cast<double>(rows) : 1);
      }
    }
}

// From the sums over rows to their means (NaN if there are none).
void ManyEpochsRun::finish_epochs(int64_t epoch, int64_t epochs) {
  for (const int64_t last = epoch + epochs; epoch < last; ++epoch) {
    double* const losses = &losses_[epoch * networks_.size()];
    for (size_t i = 0; mean_ && i < networks_.size(); ++i)
      losses[networks_.index(i)] /= static_cast<double>(rows_of(i));
    if (epochs_.after_epoch.is_none()) continue;
    double lowest = std::numeric_limits<double>::quiet_NaN();
    for (size_t i = 0; i < networks_.size(); ++i)
      if (!networks_.has_failed(i)) lowest = std::fmin(lowest, losses[networks_.index(i)]);
    const py::gil_scoped_acquire gil;
    epochs_.after_epoch(epoch, lowest);
  }
}

}  // namespace mlp_ext
