#include "python/optimizer_state.h"

#include <ATen/ops/full_like.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "math/optimizers.h"
#include "ops/checks.h"

namespace py = pybind11;

namespace mlp_ext {

using at::Tensor;

namespace {

py::object interned(const std::string& text) {
  return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(text.c_str()));
}

// Names looked up at each step. Never freed: the interpreter may be gone.
struct Keys {
  const py::handle groups = PyUnicode_InternFromString("param_groups"), state = PyUnicode_InternFromString("state"),
                   step = PyUnicode_InternFromString("step"), defaults = PyUnicode_InternFromString("defaults");
};
const Keys& keys() {
  static const Keys keys;
  return keys;
}

std::string text(py::handle name) { return py::cast<std::string>(name); }

// dict[key], or null if missing.
py::handle find(py::handle dict, py::handle key) {
  PyObject* const found = PyDict_GetItemWithError(dict.ptr(), key.ptr());
  if (!found && PyErr_Occurred()) throw py::error_already_set();
  return found;
}

py::handle item(py::handle dict, py::handle key) {
  const py::handle found = find(dict, key);
  TORCH_CHECK_VALUE(found, "TrainStep: optimizer has no ", text(key));
  return found;
}

void set(py::handle dict, py::handle key, py::handle value) {
  if (PyDict_SetItem(dict.ptr(), key.ptr(), value.ptr()) != 0) throw py::error_already_set();
}

void remove(py::handle dict, py::handle key) {
  if (PyDict_DelItem(dict.ptr(), key.ptr()) == 0) return;
  if (!PyErr_ExceptionMatches(PyExc_KeyError)) throw py::error_already_set();
  PyErr_Clear();
}

void check_dict(py::handle object, const char* name) {
  TORCH_CHECK_TYPE(PyDict_Check(object.ptr()), "TrainStep: ", name, " must be a dict, got ",
                   Py_TYPE(object.ptr())->tp_name);
}

double number(py::handle value, py::handle name) {  // a float, a bool, or a tensor of one element
  if (PyFloat_CheckExact(value.ptr())) return PyFloat_AS_DOUBLE(value.ptr());
  if (THPVariable_Check(value.ptr())) {
    const Tensor& t = THPVariable_Unpack(value.ptr());
    TORCH_CHECK_TYPE(t.numel() == 1 && !t.is_meta() && !t.is_complex(), "TrainStep: optimizer.param_groups has ",
                     text(name), " = a tensor ", t.sizes(), " of ", dtype_name(t.scalar_type()), " on ", t.device(),
                     "; it must be a number");
    return t.item<double>();
  }
  const double found = PyFloat_AsDouble(value.ptr());
  if (found == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    TORCH_CHECK_TYPE(false, "TrainStep: optimizer.param_groups has ", text(name), " = ", Py_TYPE(value.ptr())->tp_name,
                     "; it must be a number");
  }
  return found;
}

// entry[name], or undefined if missing.
Tensor state_of(py::handle entry, py::handle name) {
  const py::handle found = entry ? find(entry, name) : py::handle();
  if (!found || found.is_none()) return {};
  TORCH_CHECK_TYPE(THPVariable_Check(found.ptr()), "TrainStep: ", text(name),
                   " in optimizer.state must be a tensor, got ", Py_TYPE(found.ptr())->tp_name);
  return THPVariable_Unpack(found.ptr());
}

// A new step count, like torch.optim's: fused kernels need it on the parameter's device.
Tensor new_step(const Tensor& parameter, py::handle group) {
  PyObject* const fused = PyDict_GetItemString(group.ptr(), "fused");
  if (fused && PyObject_IsTrue(fused) == 1) return at::zeros({}, parameter.options().dtype(at::kFloat));
  const bool wide = c10::get_default_dtype_as_scalartype() == at::kDouble;
  return at::zeros({}, at::device(at::kCPU).dtype(wide ? at::kDouble : at::kFloat));
}

template <class Functor>
constexpr size_t index_of_parameter(std::string_view name) {
  size_t i = 0;
  while (i < Functor::parameters.size() && Functor::parameters[i].name != name) ++i;
  return i;
}

}  // namespace

OptimizerReader::OptimizerReader(const py::object& optimizer, std::string name,
                                 const std::map<std::string, double>& defaults, const py::sequence& parameters,
                                 std::vector<int64_t> groups)
    : groups_(std::move(groups)),
      name_(std::move(name)),
      index_(index_of(name_, Optimizers{})),
      optimizer_(optimizer.attr("__dict__")) {
  for (const py::handle p : parameters) {
    TORCH_CHECK_TYPE(THPVariable_Check(p.ptr()), "TrainStep: a parameter must be a tensor");
    parameters_.push_back(py::reinterpret_borrow<py::object>(p));
  }
  const py::handle own_defaults = item(optimizer_, keys().defaults);
  visit(Optimizers{}, index_, [&](auto functor) {
    for (const Parameter& parameter : decltype(functor)::parameters) {
      const std::string full(parameter.name);
      const size_t bracket = full.find('[');
      Setting setting{interned(full.substr(0, bracket)),
                      bracket == std::string::npos ? -1 : std::stoll(full.substr(bracket + 1)), std::nullopt};
      if (!find(own_defaults, setting.key)) {
        const auto found = defaults.find(full);
        setting.value = found == defaults.end() ? parameter.value : found->second;
      }
      settings_.push_back(std::move(setting));
    }
    for (const char* state : decltype(functor)::states) state_names_.push_back(interned(state));
  });
}

OptimizerState OptimizerReader::read() const {
  OptimizerState now;
  for (size_t i = 0; i < size(); ++i) now.parameters.push_back(parameter(i));
  visit(Optimizers{}, index_, [&](auto functor) { read_as<decltype(functor)>(now); });
  TORCH_CHECK(!now.learning.empty(), "TrainStep: nothing learns: no parameter of the optimizer requires a gradient");
  return now;
}

template <class Functor>
void OptimizerReader::read_as(OptimizerState& now) const {
  const py::handle groups = item(optimizer_, keys().groups), states = item(optimizer_, keys().state);
  py::handle group;
  std::array<double, Functor::parameters.size()> numbers{};
  int64_t read = -1;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    if (groups_[i] < 0 || !now.parameters[i].requires_grad()) continue;
    if (read != groups_[i]) {
      read = groups_[i];
      group = PyList_GET_ITEM(groups.ptr(), read);
      read_group(group, numbers.data());
    }
    now.learning.push_back(static_cast<int64_t>(i));
    now.hyperparameters.append(numbers.begin(), numbers.end());
    const Functor optimizer = make<Functor>(numbers.data());
    bool has_states = Functor::counts_steps;
    for (size_t s = 0; s < Functor::states.size(); ++s) has_states = has_states || optimizer.has_state(s);
    if (has_states) read_states(i, optimizer, group, states, now);
  }
}

void OptimizerReader::read_group(py::handle group, double* numbers) const {
  for (const Setting& setting : settings_) {
    py::handle value = find(group, setting.key);
    TORCH_CHECK_VALUE(value || setting.value, "TrainStep: optimizer.param_groups has no ", text(setting.key));
    if (value && setting.element >= 0) {
      const bool fits =
          (PyTuple_Check(value.ptr()) || PyList_Check(value.ptr())) && PySequence_Fast_GET_SIZE(value.ptr()) == 2;
      TORCH_CHECK_TYPE(fits, "TrainStep: optimizer.param_groups has ", text(setting.key), " = ",
                       Py_TYPE(value.ptr())->tp_name, "; it must be a tuple of 2 numbers");
      value = PySequence_Fast_GET_ITEM(value.ptr(), setting.element);
    }
    *numbers++ = value ? number(value, setting.key) : *setting.value;
  }
}

// Reads or creates the states that the parameter has with these hyperparameters, in order. Like torch.optim, creates
// all at once, or, for optimizers without a step count, each when it is first needed.
template <class Functor>
void OptimizerReader::read_states(size_t i, const Functor& optimizer, py::handle group, py::handle states,
                                  OptimizerState& now) const {
  check_dict(states, "optimizer.state");
  const py::handle entry = find(states, parameters_[i]);
  if (entry) check_dict(entry, "each parameter's entry in optimizer.state");
  const bool may_create = !Functor::counts_steps || !entry || PyDict_Size(entry.ptr()) == 0;
  const auto add = [&](auto& list, py::handle name, const auto& make_state) {
    Tensor tensor = state_of(entry, name);
    if (!tensor.defined()) {
      TORCH_CHECK_VALUE(may_create, "TrainStep: optimizer.state has no ", text(name), " of a parameter that it has ",
                        "other states of, as after an option was changed; make a new optimizer");
      tensor = make_state();
      now.created.push_back({i, py::reinterpret_borrow<py::object>(name), tensor});
    }
    list.push_back(std::move(tensor));
  };
  if (Functor::counts_steps) add(now.steps, keys().step, [&] { return new_step(now.parameters[i], group); });
  for (size_t s = 0; s < Functor::states.size(); ++s) {
    if (!optimizer.has_state(s)) continue;
    const size_t before = now.created.size();
    add(now.states, state_names_[s], [&] {
      const py::handle value =
          PyDict_GetItemString(item(optimizer_, keys().defaults).ptr(), "initial_accumulator_value");
      return at::full_like(now.parameters[i], value ? number(value, py::str("initial_accumulator_value")) : 0);
    });
    constexpr size_t dampening = index_of_parameter<Functor>("dampening");  // 0 in the first step
    if constexpr (dampening < Functor::parameters.size()) {
      const size_t index = now.hyperparameters.size() - Functor::parameters.size() + dampening;
      if (now.created.size() > before) now.later.push_back({index, std::exchange(now.hyperparameters[index], 0)});
    }
  }
}

// In the order of the groups, like optimizer.step().
void OptimizerReader::begin_step(std::vector<OptimizerState::Created>& created) const {
  // torch's schedulers wrap optimizer.step, which sets this when it begins, and warn if it is missing.
  if (find(optimizer_, keys().step)) optimizer_["_opt_called"] = py::bool_(true);
  if (created.empty()) return;
  const py::handle states = item(optimizer_, keys().state);
  for (const py::handle group : item(optimizer_, keys().groups))
    for (const py::handle parameter : group["params"])
      for (OptimizerState::Created& c : created)
        if (parameter.is(parameters_[c.parameter])) store(c, states);
}

void OptimizerReader::store(OptimizerState::Created& created, py::handle states) const {
  const py::object& parameter = parameters_[created.parameter];
  created.entry = py::reinterpret_borrow<py::object>(find(states, parameter));
  created.is_new_entry = !created.entry;
  if (created.is_new_entry) {
    created.entry = py::dict();
    set(states, parameter, created.entry);
  }
  created.before = py::reinterpret_borrow<py::object>(find(created.entry, created.name));
  set(created.entry, created.name, py::cast(created.tensor));
}

void OptimizerReader::take_back(std::vector<OptimizerState::Created>& created) const {
  const py::error_scope error;  // torch's errors are also the interpreter's, in which no operator can run
  const auto has_changed = [](const OptimizerState::Created& c) { return c.tensor.any().item<bool>(); };
  if (std::none_of(created.begin(), created.end(), has_changed)) {
    for (const OptimizerState::Created& c : created)
      if (c.before)
        set(c.entry, c.name, c.before);
      else if (c.entry)
        remove(c.entry, c.name);
    for (const OptimizerState::Created& c : created)
      if (c.is_new_entry) remove(item(optimizer_, keys().state), parameters_[c.parameter]);
  }
  created.clear();
}

int OptimizerReader::traverse(visitproc visit, void* arg) const {
  Py_VISIT(optimizer_.ptr());
  for (const py::object& p : parameters_) Py_VISIT(p.ptr());
  return 0;
}

void OptimizerReader::clear() {
  optimizer_ = py::object();
  parameters_.clear();
}

}  // namespace mlp_ext
