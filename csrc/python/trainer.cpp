// What stands behind TrainStep: reads the optimizer, calls mlp_sgd_step_, once or over epochs and batches. In C++ since
// a step of a small network takes less time than the Python that would prepare it.
#include "python/trainer.h"

#include <ATen/Context.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/randperm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/anomaly_mode.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/pybind.h>

#include <chrono>
#include <functional>
#include <utility>

#include "ops/train.h"
#include "python/guards.h"

namespace py = pybind11;

namespace mlp_ext {
namespace {

using at::Tensor;
using Clock = std::chrono::steady_clock;

constexpr auto kBetweenSignals = std::chrono::milliseconds(50);
constexpr int64_t kStepsBetweenSignals = 4096;        // where many steps are one call: as many microseconds or more
constexpr int64_t kRepeatedBytes = int64_t(1) << 20;  // of input: where it is one launch per step, each gathers it
constexpr int64_t kShuffledBytes = int64_t(8) << 20;  // of input that are gathered at a time

// What the optimizer says now about the parameters that learn.
struct Update {
  struct Fresh {  // a momentum buffer that the optimizer does not have yet: its first step goes without dampening
    size_t place, buffer;  // of its parameter in learning; among momentum_buffers
    double dampening;      // of the steps that follow
  };
  c10::SmallVector<int64_t, 16> learning;
  c10::SmallVector<double, 16 * Sgd::size> hyperparameters;
  c10::SmallVector<Tensor, 16> momentum_buffers;
  c10::SmallVector<Fresh, 16> fresh;

  double& dampening(size_t place) { return hyperparameters[place * Sgd::size + 2]; }
};

class Trainer {
 public:
  // groups: of each parameter the place of its group in param_groups, or -1 where the optimizer does not have it.
  Trainer(std::vector<Tensor> parameters, std::vector<int64_t> groups, const std::vector<std::string>& activations,
          std::string loss, std::string reduction, std::optional<Tensor> loss_weight, int64_t ignore_index,
          double label_smoothing, py::object optimizer, Guards watch)
      : parameters_(std::move(parameters)),
        groups_(std::move(groups)),
        activations_(activations),
        loss_(std::move(loss)),
        reduction_(std::move(reduction)),
        loss_weight_(std::move(loss_weight)),
        ignore_index_(ignore_index),
        label_smoothing_(label_smoothing),
        optimizer_(optimizer.attr("__dict__")),
        watch_(std::move(watch)) {
    for (const Tensor& p : parameters_) {
      python_parameters_.push_back(py::cast(p));
      hooks_.push_back(hooks(p));
    }
  }

  // Whether model, criterion and optimizer are made of the same parts as when this was made.
  bool is_current() const {
    if (!watch_.holds()) return false;
    for (size_t i = 0; i < parameters_.size(); ++i)
      if (hooks(parameters_[i]) != hooks_[i]) return false;
    return true;
  }

  // The loss; none, and nothing done, unless is_current(). graph: None, or what does the step, as of through().
  std::optional<Tensor> step(const py::object& input, const py::object& target, const py::object& graph) {
    if (!is_current()) return std::nullopt;
    const Tensor &x = data(input, "input"), &y = data(target, "target");
    check_state(x, y);
    Update update = read_optimizer();
    Tensor loss;
    if (!graph.is_none() && update.fresh.empty()) {
      loss = through(graph, update)(x, y);
    } else {
      const py::gil_scoped_release no_gil;
      loss = run(x, y, update);
    }
    keep_fresh_buffers(update);
    tell_schedulers();
    return loss;
  }

  // One loss for each epoch, the mean over its rows, or the sum. after_epoch(epoch, loss) is called after each.
  // graph: None, or what does each batch's step. at_once: many steps are one call, each as short as its launch.
  // None, and nothing done, unless is_current().
  std::optional<std::vector<double>> fit(const py::object& x, const py::object& y, int64_t epochs, int64_t batch_size,
                                         bool shuffle, const std::optional<at::Generator>& generator,
                                         const py::object& after_epoch, const py::object& graph, bool at_once) {
    if (!is_current()) return std::nullopt;
    const Tensor &input = data(x, "input"), &target = data(y, "target");
    check_state(input, target);
    TORCH_CHECK_VALUE(batch_size >= 1, "TrainStep: batch_size must be from 1 on, got ", batch_size);
    batch_size = std::min(batch_size, std::max<int64_t>(1, input.size(0)));  // so that it is small enough to multiply
    Update update = read_optimizer();
    std::vector<double> losses;
    const bool one_batch = !shuffle && batch_size >= input.size(0) && input.size(0) > 0;
    const bool by_graph = !graph.is_none();
    Train replay;  // of Python: to end when the GIL is held again
    const py::gil_scoped_release no_gil;
    Clock::time_point last = Clock::now();
    bool first = true;
    const auto after_steps = [&] {
      if (first) {
        const py::gil_scoped_acquire gil;
        keep_fresh_buffers(update);
        tell_schedulers();
        first = false;
      }
      if (const auto now = Clock::now(); now - last > kBetweenSignals) {
        last = now;
        const py::gil_scoped_acquire gil;
        if (PyErr_CheckSignals()) throw py::error_already_set();
      }
    };
    const Train train = [&](const Tensor& x, const Tensor& y) {
      Tensor loss;
      if (by_graph && update.fresh.empty()) {
        const py::gil_scoped_acquire gil;
        if (!replay) replay = through(graph, update);
        loss = replay(x, y);
      } else {
        loss = run(x, y, update);
      }
      after_steps();
      return loss;
    };
    // The first step has a dampening of its own.
    const auto train_many = [&](const Tensor& x, const Tensor& y, const std::optional<Tensor>& order) {
      const int64_t rows = order ? order->size(0) : x.size(0);
      std::vector<Tensor> found;
      for (int64_t begin = 0, size = 0; begin < rows; begin += size) {
        size = std::min(rows - begin, (first ? 1 : kStepsBetweenSignals) * batch_size);
        const auto part = [&](const Tensor& t) { return t.narrow(0, begin, size); };
        found.push_back(order ? run_many(x, y, part(*order), batch_size, update)
                              : run_many(part(x), part(y), std::nullopt, batch_size, update));
        after_steps();
      }
      return found;
    };
    const bool repeats = one_batch && after_epoch.is_none();
    if (at_once && repeats && static_cast<int64_t>(input.nbytes()) <= kRepeatedBytes) {
      batch_size = input.size(0);
      return train_epochs_at_once(input, target, epochs, train_many);
    }
    if (repeats && (input.is_cuda() || by_graph)) return train_epochs(input, target, epochs, train);
    for (int64_t epoch = 0; epoch < epochs; ++epoch) {
      const double loss = one_batch ? value(train(input, target))
                          : at_once ? train_epoch_at_once(input, target, batch_size, shuffle, generator, train_many)
                                    : train_epoch(input, target, batch_size, shuffle, generator, train);
      losses.push_back(loss);
      if (after_epoch.is_none()) continue;
      const py::gil_scoped_acquire gil;
      after_epoch(epoch, loss);
    }
    return losses;
  }

 private:
  using Train = std::function<Tensor(const Tensor&, const Tensor&)>;  // input, target -> loss

  Tensor run(const Tensor& input, const Tensor& target, const Update& update) const {
    return mlp_sgd_step_(input, target, parameters_, update.momentum_buffers, activations_, loss_, reduction_,
                         loss_weight_, ignore_index_, label_smoothing_, update.learning, update.hyperparameters);
  }

  Tensor run_many(const Tensor& input, const Tensor& target, const std::optional<Tensor>& order, int64_t batch_size,
                  const Update& update) const {
    return mlp_sgd_steps_(input, target, parameters_, update.momentum_buffers, activations_, loss_, reduction_,
                          loss_weight_, ignore_index_, label_smoothing_, update.learning, update.hyperparameters, order,
                          batch_size);
  }

  // run() by the Python function graph(step, key, input, target), which calls step or replays what it captured of it
  // with the same key. Once momentum has begun, and with the GIL.
  Train through(const py::object& graph, const Update& update) const {
    const py::object step = py::cpp_function(torch::wrap_pybind_function_no_gil(
        [this, alive = py::cast(this), update](const Tensor& x, const Tensor& y) { return run(x, y, update); }));
    return [this, graph, step, key = key(update), &update](const Tensor& x, const Tensor& y) {
      const Tensor loss = graph(step, key, x, y).cast<Tensor>();
      bump_versions(parameters_, update.momentum_buffers, update.learning);  // autograd does not see a replay
      return loss;
    };
  }

  // What a captured step does to which memory, beside what its arguments say.
  py::bytes key(const Update& update) const {
    std::string key(reinterpret_cast<const char*>(update.hyperparameters.data()),
                    update.hyperparameters.size() * sizeof(double));
    const auto add = [&key](int64_t v) { key.append(reinterpret_cast<const char*>(&v), sizeof(v)); };
    for (const int64_t place : update.learning) add(place);
    add(static_cast<int64_t>(at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL)));
    add(at::globalContext().deterministicAlgorithms());
    for (const auto& tensors : {at::TensorList(parameters_), at::TensorList(update.momentum_buffers)})
      for (const Tensor& t : tensors) add(reinterpret_cast<int64_t>(t.const_data_ptr()));
    return key;
  }

  // As train_epoch, for a device that does many steps at once.
  template <class TrainMany>
  double train_epoch_at_once(const Tensor& input, const Tensor& target, int64_t batch_size, bool shuffle,
                             const std::optional<at::Generator>& generator, const TrainMany& train_many) const {
    std::optional<Tensor> order;
    if (shuffle) order = draw_order(input, generator);
    const std::vector<Tensor> losses = train_many(input, target, order);
    return of_epoch(losses.empty() ? at::empty({0}) : at::cat(losses), input.size(0), batch_size);
  }

  // All epochs, each of one batch: an order that has the rows again and again.
  template <class TrainMany>
  static std::vector<double> train_epochs_at_once(const Tensor& input, const Tensor& target, int64_t epochs,
                                                  const TrainMany& train_many) {
    const int64_t rows = input.size(0), places = kShuffledBytes / static_cast<int64_t>(sizeof(int64_t));
    const int64_t most = std::min({epochs, kStepsBetweenSignals, std::max<int64_t>(1, places / rows)});
    const Tensor order = at::arange(rows, input.options().dtype(at::kLong)).repeat({most});
    std::vector<Tensor> losses;
    for (int64_t epoch = 0; epoch < epochs; epoch += most)
      losses.push_back(at::cat(train_many(input, target, order.narrow(0, 0, std::min(most, epochs - epoch) * rows))));
    const Tensor all = at::cat(losses).to(at::kCPU, at::kDouble);
    return {all.const_data_ptr<double>(), all.const_data_ptr<double>() + epochs};
  }

  // All epochs, each of one batch, of a GPU: it is waited for once for many losses.
  static std::vector<double> train_epochs(const Tensor& input, const Tensor& target, int64_t epochs,
                                          const Train& train) {
    std::vector<double> losses;
    std::vector<Tensor> found;
    while (epochs-- > 0) {
      found.push_back(train(input, target));
      if (epochs % kStepsBetweenSignals != 0) continue;
      const Tensor all = at::stack(found).to(at::kCPU, at::kDouble);
      losses.insert(losses.end(), all.const_data_ptr<double>(), all.const_data_ptr<double>() + all.numel());
      found.clear();
    }
    return losses;
  }

  // The batches of an eager loop that draws torch.randperm(n, generator=generator), the last one maybe short.
  double train_epoch(const Tensor& input, const Tensor& target, int64_t batch_size, bool shuffle,
                     const std::optional<at::Generator>& generator, const Train& train) const {
    const int64_t rows = input.size(0), row_bytes = std::max<int64_t>(1, input.size(1) * input.element_size());
    const int64_t chunk = shuffle ? std::max<int64_t>(1, kShuffledBytes / row_bytes / batch_size) * batch_size : rows;
    const Tensor order = shuffle ? draw_order(input, generator) : Tensor();
    std::vector<Tensor> losses;
    for (int64_t begin = 0; begin < rows; begin += chunk) {
      const int64_t size = std::min(chunk, rows - begin);
      const auto part = [&](const Tensor& t) {
        return shuffle ? at::index_select(t, 0, order.narrow(0, begin, size)) : t.narrow(0, begin, size);
      };
      const Tensor x = part(input), y = part(target);
      for (int64_t i = 0; i < size; i += batch_size) {
        const int64_t batch = std::min(batch_size, size - i);
        losses.push_back(train(x.narrow(0, i, batch), y.narrow(0, i, batch)));
      }
    }
    return of_epoch(losses.empty() ? at::empty({0}) : at::stack(losses), rows, batch_size);
  }

  static Tensor draw_order(const Tensor& input, const std::optional<at::Generator>& generator) {
    return at::randperm(input.size(0), generator, at::dtype(at::kLong)).to(input.device());
  }

  // From the losses of an epoch's batches: the mean over its rows, NaN without any, or the sum.
  double of_epoch(const Tensor& losses, int64_t rows, int64_t batch_size) const {
    const bool mean = reduction_ == "mean";
    const Tensor all = losses.to(at::kCPU, at::kDouble);
    double total = 0;
    for (int64_t i = 0; i < all.size(0); ++i)
      total += all.const_data_ptr<double>()[i] * (mean ? std::min(batch_size, rows - i * batch_size) : 1);
    return mean ? total / rows : total;
  }

  static double value(const Tensor& loss) {  // item() would take a tenth of a small network's step
    return loss.is_cpu() && loss.scalar_type() == at::kFloat ? *loss.const_data_ptr<float>() : loss.item<double>();
  }

  static int hooks(const Tensor& p) {  // the kinds that it has, or had
    const auto* const autograd = torch::autograd::impl::get_autograd_meta(p);
    return autograd ? !autograd->hooks_.empty() + 2 * (autograd->post_acc_grad_hooks_ != nullptr) : 0;
  }

  // What the caller gave as input or target, if a step can take it.
  const Tensor& data(const py::object& given, const char* name) const {
    TORCH_CHECK_TYPE(THPVariable_Check(given.ptr()), "TrainStep: ", name, " must be a tensor, got ",
                     Py_TYPE(given.ptr())->tp_name);
    const Tensor& t = THPVariable_Unpack(given.ptr());
    TORCH_CHECK_VALUE(!t.requires_grad(), "TrainStep: ", name, " requires a gradient, which a step does not compute; ",
                      "detach it, or use the eager loop");
    TORCH_CHECK(t.layout() == at::kStrided, "TrainStep: ", name, " must be dense, got ", t.layout(),
                "; call its to_dense()");
    return t;
  }

  // Throws where torch's global state asks for what a step does not do. docs/train-step.md has the whole table.
  void check_state(const Tensor& input, const Tensor& target) const {
    constexpr const char* kLeave = "; leave it, or use the eager loop";
    TORCH_CHECK(!c10::InferenceMode::is_enabled(), "TrainStep: a step trains, which inference_mode forbids", kLeave);
    TORCH_CHECK(c10::GradMode::is_enabled(), "TrainStep: gradients are disabled, as by no_grad, and a step trains",
                kLeave);
    const auto device = input.device().type();
    TORCH_CHECK(!at::autocast::is_autocast_available(device) || !at::autocast::is_autocast_enabled(device),
                "TrainStep: autocast is enabled, and a step would not follow it", kLeave);
    TORCH_CHECK(!torch::autograd::AnomalyMode::is_enabled(),
                "TrainStep: anomaly detection is on, and a step does not look for NaN", kLeave);
    TORCH_CHECK(!at::SavedTensorDefaultHooks::get_hooks(),
                "TrainStep: saved-tensor hooks are set, and a step saves no tensor to call them with", kLeave);
    TORCH_CHECK(!c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode),
                "TrainStep: a step changes parameters in place, which torch.func's transforms cannot follow", kLeave);
    if (torch::autograd::ForwardADLevel::try_get_by_idx(0)) {
      const auto has_tangent = [](const Tensor& t) { return t._fw_grad(0).defined(); };
      TORCH_CHECK(!has_tangent(input) && !has_tangent(target) &&
                      std::none_of(parameters_.begin(), parameters_.end(), has_tangent),
                  "TrainStep: input, target or a parameter has a forward-mode tangent, which a step would drop",
                  kLeave);
    }
    if (at::impl::torch_function_mode_enabled()) check_function_modes();
  }

  // A default device is such a mode, and concerns only new tensors. Others would see torch.nn's calls in an eager loop.
  static void check_function_modes() {
    static const py::object& default_device =  // never freed: the interpreter may end before
        *new py::object(py::module_::import("torch.utils._device").attr("DeviceContext"));
    for (int64_t i = 0; i < at::impl::PythonTorchFunctionTLS::stack_len(); ++i) {
      const py::handle mode = at::impl::PythonTorchFunctionTLS::get_stack_at(i)->ptr(getPyInterpreter());
      TORCH_CHECK(
          py::isinstance(mode, default_device), "TrainStep: a ", Py_TYPE(mode.ptr())->tp_name,
          " is active, and a step makes no calls of torch functions for it to see; leave it, or use the eager loop");
    }
  }

  // torch's schedulers replace optimizer.step by one that notes its first call here, and warn where it is missing.
  void tell_schedulers() const {
    if (PyDict_GetItemString(optimizer_.ptr(), "step")) optimizer_["_opt_called"] = py::bool_(true);
  }

  Update read_optimizer() const {
    Update update;
    const py::list groups = item(optimizer_, "param_groups");
    PyObject* group = nullptr;
    double h[Sgd::size] = {};
    int64_t read = -1;
    for (size_t i = 0; i < parameters_.size(); ++i) {
      if (groups_[i] < 0 || !parameters_[i].requires_grad()) continue;
      if (read != groups_[i]) {
        read = groups_[i];
        group = PyList_GET_ITEM(groups.ptr(), read);
        int place = 0;
        for (const char* name : {"lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize"})
          h[place++] = number(item(group, name), name);
      }
      update.learning.push_back(i);
      update.hyperparameters.append(h, h + Sgd::size);
      if (h[1] == 0) continue;
      Tensor buffer = momentum_buffer(i);
      if (!buffer.defined()) {
        const size_t place = update.learning.size() - 1;
        update.fresh.push_back({place, update.momentum_buffers.size(), std::exchange(update.dampening(place), 0)});
        buffer = at::zeros_like(parameters_[i]);
      }
      update.momentum_buffers.push_back(std::move(buffer));
    }
    TORCH_CHECK(!update.learning.empty(),
                "TrainStep: nothing learns: no parameter of the optimizer requires a gradient");
    return update;
  }

  // optimizer.state[p]["momentum_buffer"], undefined if there is none.
  Tensor momentum_buffer(size_t parameter) const {
    const py::object state = item(optimizer_, "state");
    check_dict(state.ptr(), "optimizer.state");
    PyObject* const of_parameter = PyDict_GetItemWithError(state.ptr(), python_parameters_[parameter].ptr());
    if (PyErr_Occurred()) throw py::error_already_set();
    if (!of_parameter) return {};
    check_dict(of_parameter, "each parameter's entry in optimizer.state");
    PyObject* const buffer = PyDict_GetItemString(of_parameter, "momentum_buffer");
    if (!buffer || buffer == Py_None) return {};
    TORCH_CHECK_TYPE(THPVariable_Check(buffer),
                     "TrainStep: a momentum_buffer in optimizer.state must be a tensor, got ",
                     Py_TYPE(buffer)->tp_name);
    return THPVariable_Unpack(buffer);
  }

  // After the first step.
  void keep_fresh_buffers(Update& update) const {
    if (update.fresh.empty()) return;
    const py::object state = item(optimizer_, "state");
    for (const auto& [place, buffer, dampening] : update.fresh) {
      const py::object& parameter = python_parameters_[update.learning[place]];
      if (!state.contains(parameter)) state[parameter] = py::dict();
      state[parameter]["momentum_buffer"] = py::cast(update.momentum_buffers[buffer]);
      update.dampening(place) = dampening;
    }
    update.fresh.clear();
  }

  static void check_dict(PyObject* object, const char* name) {
    TORCH_CHECK_TYPE(PyDict_Check(object), "TrainStep: ", name, " must be a dict, got ", Py_TYPE(object)->tp_name);
  }

  static py::object item(py::handle dict, const char* name) {
    PyObject* const found = PyDict_GetItemString(dict.ptr(), name);
    if (!found) throw py::key_error(name);
    return py::reinterpret_borrow<py::object>(found);
  }

  static double number(py::handle value, const char* name) {  // a float, a bool, or a tensor of one element
    if (THPVariable_Check(value.ptr())) return THPVariable_Unpack(value.ptr()).item<double>();
    const double found = PyFloat_AsDouble(value.ptr());
    if (PyErr_Occurred()) {
      PyErr_Clear();
      TORCH_CHECK_TYPE(false, "TrainStep: optimizer.param_groups has ", name, " = ", Py_TYPE(value.ptr())->tp_name,
                       "; it must be a number");
    }
    return found;
  }

  const std::vector<Tensor> parameters_;
  std::vector<py::object> python_parameters_;  // keys of optimizer.state
  std::vector<int> hooks_;                     // of each parameter
  const std::vector<int64_t> groups_;
  const c10::List<std::string> activations_;
  const std::string loss_, reduction_;
  const std::optional<Tensor> loss_weight_;
  const int64_t ignore_index_;
  const double label_smoothing_;
  const py::dict optimizer_;
  const Guards watch_;
};

}  // namespace

void bind_trainer(py::module_& m) {
  py::class_<Trainer>(m, "Trainer", "What stands behind mlp_ext.TrainStep.")
      .def(py::init<std::vector<Tensor>, std::vector<int64_t>, const std::vector<std::string>&, std::string,
                    std::string, std::optional<Tensor>, int64_t, double, py::object, Guards>(),
           py::arg("parameters"), py::arg("groups"), py::arg("activations"), py::arg("loss"), py::arg("reduction"),
           py::arg("loss_weight"), py::arg("ignore_index"), py::arg("label_smoothing"), py::arg("optimizer"),
           py::arg("watch"))
      .def("is_current", &Trainer::is_current)
      .def("step", torch::wrap_pybind_function(&Trainer::step), py::arg("input"), py::arg("target"),
           py::arg("graph") = py::none())
      .def("fit", torch::wrap_pybind_function(&Trainer::fit), py::arg("input"), py::arg("target"), py::arg("epochs"),
           py::arg("batch_size"), py::arg("shuffle"), py::arg("generator"), py::arg("after_epoch"),
           py::arg("graph") = py::none(), py::arg("at_once") = false);
}

}  // namespace mlp_ext
