// mlp_train_many_ on the CPU: networks in the lanes of a vector, one network to a thread, or one after another.
#include "ops/train_many.h"

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <map>

#include "cpu/layer.h"
#include "cpu/machines.h"
#include "cpu/plan.h"
#include "cpu/team.h"
#include "cpu/train.h"
#include "cpu/variants.h"
#include "ops/checks.h"

namespace mlp_ext::cpu {

namespace {

ManyPath path_of(const TrainingOfMany& many) {
  const Training& training = many.networks[0].training;
  const auto widths = training.widths();
  const DType dtype = dtype_of(training.input);
  return make_many_plan(many.batch_size, {widths.data(), widths.size()}, item_size(dtype), dot_mode_of(dtype),
                        machine());
}

at::Tensor zero_losses(const TrainingOfMany& many) {
  const auto count = static_cast<int64_t>(many.networks.size());
  return at::zeros({count, many.epochs * many.batches()}, many.inputs[0].options());
}

// ---- cores ----

at::Tensor on_cores(const TrainingOfMany& many) {
  const at::Tensor losses = zero_losses(many);
  NetworkErrors errors(many.networks.size());
  for_pieces(losses.size(0), [&](int64_t i) {
    const OnOneThread alone;
    errors.run(i, [&] { train_one(many, many.networks[i], losses.select(0, i), train); });
  });
  errors.rethrow();
  return losses;
}

// ---- lanes ----

// Networks in one vector must have the same key: the number of rows, and which hyperparameters are zero, since these
// switch terms of an update off.
std::string lane_key(const TrainedNetwork& network) {
  std::string key = std::to_string(network.rows());
  for_learning(network.training, [&](const TrainedParameter& p) {
    visit(*p.optimizer, [&](auto optimizer) {
      for (size_t i = 0; i < decltype(optimizer)::parameters.size(); ++i) key += p.hyperparameters[i] ? '1' : '0';
    });
  });
  return key;
}

bool fits_lanes(const Training& training) {
  bool steps_on_cpu = true;
  for_learning(training, [&](const TrainedParameter& p) { steps_on_cpu &= !p.step || p.step->is_cpu(); });
  return steps_on_cpu && is_contiguous(training);
}

class Lanes {
 public:
  explicit Lanes(const TrainingOfMany& many)
      : many_(many),
        first_(many.networks[0].training),
        dtype_(dtype_of(first_.input)),
        kernels_(*variant().lane_kernels(dtype_)),
        losses_(zero_losses(many)),
        losses_per_epoch_(many.batches()) {
    for (const at::Tensor& t : many.inputs) inputs_.push_back(unit_stride(t));
    for (const at::Tensor& t : many.targets) targets_.push_back(unit_stride(t));
    for (const TrainedLayer& layer : first_.layers) {
      const at::Tensor& w = *layer.weight.value;
      layers_.push_back({w.size(1), w.size(0), &layer.activation, layer.bias.value != nullptr,
                         layer.weight.optimizer.has_value(), layer.bias.optimizer.has_value()});
    }
    loss_weight_ = weight_row(first_);
    parameters_.reserve(2 * layers_.size() * many.networks.size());
    for (const TrainedNetwork& network : many.networks) add(network);
  }

  at::Tensor run() {
    NetworkErrors errors(networks_.size());
    std::map<std::string, std::vector<int64_t>> alike;
    std::vector<std::span<const int64_t>> groups;
    for (size_t i = 0; i < networks_.size(); ++i) {
      const TrainedNetwork& network = many_.networks[i];
      alike[fits_lanes(network.training) ? lane_key(network) : ""].push_back(i);
    }
    const auto lanes = static_cast<size_t>(kernels_.lanes());
    for (const auto& [key, members] : alike)
      for (size_t begin = 0; begin < members.size(); begin += key.empty() ? 1 : lanes)
        groups.push_back({&members[begin], std::min(key.empty() ? 1 : lanes, members.size() - begin)});
    for_pieces(static_cast<int64_t>(groups.size()), [&](int64_t g) {
      const OnOneThread alone;
      const std::span<const int64_t> group = groups[g];
      if (fits_lanes(many_.networks[group[0]].training)) return errors.run_all(group, [&] { run(group, errors); });
      errors.run(group[0], [&] { train_one(many_, many_.networks[group[0]], losses_.select(0, group[0]), train); });
    });
    errors.rethrow();
    return losses_;
  }

 private:
  void add(const TrainedNetwork& network) {
    const size_t e = networks_.size();
    const auto of = [e](const auto& list) -> const at::Tensor& { return list[list.size() == 1 ? 0 : e]; };
    const auto matrix = [](const at::Tensor& t) { return ConstMatrix{t.const_data_ptr(), t.stride(0)}; };
    const at::Tensor &x = of(inputs_), &target = of(targets_);
    LaneNetwork lane{parameters_.data() + parameters_.size(), matrix(x)};
    for (const TrainedLayer& layer : network.training.layers)
      for (const TrainedParameter* p : {&layer.weight, &layer.bias}) {
        LaneParameter parameter{};
        if (p->value)
          parameter.value = p->optimizer ? p->value->mutable_data_ptr() : const_cast<void*>(p->value->const_data_ptr());
        p->put_states(parameter.states);
        parameter.hyperparameters = p->hyperparameters;
        if (p->step && p->step->is_cpu()) parameter.count = count_of(*p->step);
        parameters_.push_back(parameter);
      }
    if (first_.target_is_classes) {
      lane.classes = target.const_data_ptr<int64_t>();
      lane.classes_stride = target.stride(0);
    } else {
      lane.target = matrix(target);
    }
    if (network.order) {
      orders_.push_back(network.order->contiguous());
      lane.order = orders_.back().const_data_ptr<int64_t>();
    }
    lane.losses = losses_.select(0, static_cast<int64_t>(e)).mutable_data_ptr();
    networks_.push_back(lane);
  }

  void run(std::span<const int64_t> group, NetworkErrors& errors) {
    c10::SmallVector<LaneNetwork, 16> networks;
    for (const int64_t i : group) networks.push_back(networks_[i]);
    const int64_t rows = many_.networks[group[0]].rows(), steps = many_.epochs * ceil_div(rows, many_.batch_size);
    const auto all_same = [&](auto field) {
      return std::all_of(networks.begin(), networks.end(),
                         [&](const LaneNetwork& n) { return field(n) == field(networks[0]); });
    };
    const LaneProblem problem{{layers_.data(), layers_.size()},
                              first_.lowest_learning,
                              &first_.loss,
                              first_.mean,
                              loss_weight_.defined() ? loss_weight_.const_data_ptr() : nullptr,
                              index_of_optimizer(),
                              rows,
                              many_.batch_size,
                              many_.epochs,
                              all_same([](const LaneNetwork& n) { return n.x.data; }),
                              all_same([](const LaneNetwork& n) { return std::pair(n.target.data, n.classes); }),
                              all_same([](const LaneNetwork& n) { return n.order; }),
                              losses_per_epoch_};
    kernels_.train(problem, {networks.data(), networks.size()}, scratch(kernels_.scratch_bytes(problem)));
    for (size_t l = 0; l < networks.size(); ++l) {
      const int64_t done = networks[l].done;
      for_learning(many_.networks[group[l]].training, [&](const TrainedParameter& p) {
        if (p.step) advance(*p.step, done);
      });
      if (done < steps) errors.run(group[l], throw_not_a_probability);
    }
  }

  size_t index_of_optimizer() const {
    size_t index = 0;
    for_learning(first_, [&](const TrainedParameter& p) { index = p.optimizer->index; });
    return index;
  }

  const TrainingOfMany& many_;
  const Training& first_;
  const DType dtype_;
  const LaneKernels& kernels_;
  const at::Tensor losses_;
  const int64_t losses_per_epoch_;
  std::vector<at::Tensor> inputs_, targets_, orders_;
  at::Tensor loss_weight_;
  c10::SmallVector<LaneLayer, 8> layers_;
  std::vector<LaneParameter> parameters_;
  std::vector<LaneNetwork> networks_;
};

at::Tensor train_many(const TrainingOfMany& many) {
  const ManyPath path = many.networks[0].training.dropout.empty() ? path_of(many) : ManyPath::turns;
  return path == ManyPath::lanes   ? Lanes(many).run()
         : path == ManyPath::cores ? on_cores(many)
                                   : train_in_turn(many, train);
}

}  // namespace

TORCH_LIBRARY_IMPL(mlp_ext, CPU, m) { m.impl("mlp_train_many_", train_many_kernel<train_many>); }

}  // namespace mlp_ext::cpu
