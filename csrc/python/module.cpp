// The Python module mlp_ext._C: loading it registers the operators. It also reports the build, machines and plans, and
// binds Guards, MlpCall, Trainer and Trainers.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <deque>
#include <initializer_list>
#include <mutex>
#include <set>
#include <thread>

#include "cpu/caching_allocator.h"
#include "cpu/machines.h"
#include "cpu/plan.h"
#include "cpu/scratch.h"
#include "cpu/variants.h"
#include "cuda/plan.h"
#include "math/activations.h"
#include "math/losses.h"
#include "math/optimizers.h"
#include "python/guards.h"
#include "python/mlp_call.h"
#include "python/trainer.h"
#include "python/trainers.h"

namespace py = pybind11;

namespace mlp_ext {
namespace {

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const cpu::Variant& variant : cpu::variants()) names.insert(names.begin(), variant.name);
  return names;
}

py::dict build_info() {
  py::dict info;
  info["mlp_ext"] = MLP_EXT_VERSION;
  info["torch"] = TORCH_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["instruction_sets"] = instruction_sets();
  info["l2_per_core"] = cpu::l2_per_core();
#if defined(_OPENMP)
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = py::none();
#endif
  return info;
}

// Number of threads of an at::parallel_for in this module: 1 if it was built without OpenMP.
size_t parallel_for_threads() {
  std::mutex mutex;
  std::set<std::thread::id> ids;
  const int64_t pieces = at::get_num_threads();
  at::parallel_for(0, pieces, 1, [&](int64_t, int64_t) {
    const std::lock_guard<std::mutex> lock(mutex);
    ids.insert(std::this_thread::get_id());
  });
  return ids.size();
}

// The enumerator of that name.
template <class Enum, size_t count>
Enum named(const char* what, const std::string& name, const char* const (&names)[count]) {
  const auto found = std::find(std::begin(names), std::end(names), name);
  if (found != std::end(names)) return static_cast<Enum>(found - std::begin(names));
  std::string known = names[0];
  for (size_t i = 1; i < count; ++i) known += (i + 1 < count ? ", " : " or ") + std::string(names[i]);
  throw py::value_error(std::string(what) + " must be " + known + ", got '" + name + "'");
}

cpu::DotMode dot_mode(const std::string& name) { return named<cpu::DotMode>("mode", name, cpu::kDotModes); }

void check_sizes(std::initializer_list<int64_t> sizes) {
  for (const int64_t size : sizes)
    if (size < 0) throw py::value_error("sizes must be from 0 on, got " + std::to_string(size));
}

// CPU plans multiply M K N by small factors, in int64.
void check_cpu(int64_t M, int64_t K, int64_t N, int64_t item_size, int64_t threads) {
  check_sizes({M, K, N});
  double product = 1;
  for (const int64_t size : {M, K, N}) product *= static_cast<double>(std::max<int64_t>(1, size));
  if (product > 0x1p53) throw py::value_error("the product of the sizes must be at most 2^53");
  if (item_size != 2 && item_size != 4 && item_size != 8)
    throw py::value_error("item_size must be 2, 4 or 8, got " + std::to_string(item_size));
  if (threads < 1 || threads > 1 << 16)
    throw py::value_error("threads must be from 1 to 65536, got " + std::to_string(threads));
}

const cpu::Machine& machine_named(const std::optional<std::string>& name) {
  if (!name) return cpu::machine();
  if (const cpu::Machine* const found = cpu::find_machine(*name)) return *found;
  std::string names;
  for (const cpu::Machine* m : cpu::machines()) names += (names.empty() ? "" : ", ") + std::string(m->name);
  throw py::value_error("machine must be one of " + names + ", got '" + *name + "'");
}

// The limits of a machine, one dict for each way of multiplying.
py::dict machine_limits(const std::optional<std::string>& name) {
  const cpu::Machine& machine = machine_named(name);
  py::dict result;
  result["name"] = machine.name;
  result["bfloat16"] = cpu::kDotModes[static_cast<int>(machine.bfloat16)];
  for (const auto& mode : cpu::kModes) {
    py::dict limits;
    for (const cpu::Limit& limit : cpu::kLimits) limits[limit.name] = machine.*mode.limits.*limit.value;
    result[mode.name] = limits;
  }
  return result;
}

// Uses the limits given, and those of this processor for the rest. Raises ValueError, with nothing changed.
void use_machine(const std::optional<py::dict>& own) {
  if (!own) return cpu::use_machine(nullptr);
  struct Own {
    std::string name;
    cpu::Machine machine;
  };
  static std::deque<Own> kept;  // plans refer to them
  Own made{"own", cpu::detected_machine()};
  for (const auto& [key, value] : *own) {
    const auto name = py::cast<std::string>(key);
    if (name == "name") made.name = py::cast<std::string>(value);
    if (name == "bfloat16") made.machine.bfloat16 = dot_mode(py::cast<std::string>(value));
    if (name == "name" || name == "bfloat16") continue;
    const auto mode = std::find_if(std::begin(cpu::kModes), std::end(cpu::kModes),
                                   [&](const auto& mode) { return name == mode.name; });
    if (mode == std::end(cpu::kModes))
      throw py::value_error("expected name, bfloat16, fma, converted, bf16_dot or amx, got '" + name + "'");
    for (const auto& [limit_key, number] : py::cast<py::dict>(value)) {
      const auto limit_name = py::cast<std::string>(limit_key);
      const auto limit = std::find_if(std::begin(cpu::kLimits), std::end(cpu::kLimits),
                                      [&](const cpu::Limit& limit) { return limit_name == limit.name; });
      if (limit == std::end(cpu::kLimits)) throw py::value_error(name + " has no limit '" + limit_name + "'");
      const bool is_whole = py::isinstance<py::int_>(number) && !py::isinstance<py::bool_>(number);
      int too_large = 0;
      const int64_t n = is_whole ? PyLong_AsLongLongAndOverflow(number.ptr(), &too_large) : -1;  // -1 if too large
      if (n < limit->least || n > limit->most)
        throw py::value_error(name + "." + limit_name + " must be a whole number from " + std::to_string(limit->least) +
                              " to " + std::to_string(limit->most) + ", got " + std::string(py::repr(number)));
      made.machine.*(mode->limits).*(limit->value) = n;
    }
  }
  kept.push_back(std::move(made));
  kept.back().machine.name = kept.back().name.c_str();
  cpu::use_machine(&kept.back().machine);
}

std::optional<cpu::Path> cpu_path(const std::optional<std::string>& name) {
  return name ? std::optional(named<cpu::Path>("path", *name, cpu::kPathNames)) : std::nullopt;
}

py::dict plan(int64_t M, int64_t K, int64_t N, int64_t item_size, int64_t threads, const std::string& mode,
              bool library, bool update, const std::optional<std::string>& machine,
              const std::optional<std::string>& forward, const std::optional<std::string>& backward) {
  check_cpu(M, K, N, item_size, threads);
  const cpu::Plan plan = cpu::make_plan(
      {M, K, N, item_size, dot_mode(mode)}, threads, machine_named(machine),
      {.library = library, .update = update, .forward = cpu_path(forward), .backward = cpu_path(backward)});
  const auto pieces = [](const cpu::Grid& grid) { return py::make_tuple(grid.rows, grid.columns, grid.samples); };
  py::dict result;
  result["forward_path"] = cpu::path_name(plan.forward_path);
  result["backward_path"] = cpu::path_name(plan.backward_path);
  result["forward"] = pieces(plan.forward);
  result["grad_input"] = pieces(plan.grad_input);
  result["grad_weight"] = pieces(plan.grad_weight);
  result["concurrent_gemms"] = plan.concurrent_gemms;
  return result;
}

DType dtype_named(const std::string& name) { return named<DType>("dtype", name, kDTypeNames); }

std::optional<cuda::Path> cuda_path(const std::optional<std::string>& name) {
  return name ? std::optional(named<cuda::Path>("path", *name, cuda::kPathNames)) : std::nullopt;
}

void check_widths(const std::vector<int64_t>& widths, int64_t batch) {
  if (widths.size() < 2) throw py::value_error("widths must name input and output");
  for (const int64_t width : widths) check_sizes({width, batch});
}

py::dict step_plan(const std::vector<int64_t>& widths, int64_t batch, int64_t item_size, int64_t threads,
                   const std::string& mode, const std::optional<std::string>& machine) {
  check_widths(widths, batch);
  for (size_t l = 1; l < widths.size(); ++l) check_cpu(batch, widths[l - 1], widths[l], item_size, threads);
  const cpu::StepPlan plan =
      cpu::make_step_plan(batch, widths, item_size, threads, dot_mode(mode), machine_named(machine));
  py::dict result;
  result["path"] = cpu::step_path_name(plan.path);
  result["pieces"] = plan.pieces;
  return result;
}

std::string many_plan(const std::vector<int64_t>& widths, int64_t batch, int64_t item_size, const std::string& mode,
                      const std::optional<std::string>& machine) {
  check_widths(widths, batch);
  for (size_t l = 1; l < widths.size(); ++l) check_cpu(batch, widths[l - 1], widths[l], item_size, 1);
  return cpu::many_path_name(cpu::make_many_plan(batch, widths, item_size, dot_mode(mode), machine_named(machine)));
}

py::dict cuda_plan(int64_t M, int64_t K, int64_t N, const std::string& dtype, const std::string& activation, int arch,
                   bool tf32, bool aligned, bool cutlass, int64_t shared, const std::optional<std::string>& path) {
  check_sizes({M, K, N});
  const cuda::Plan plan =
      cuda::make_plan({M, K, N, dtype_named(dtype), activation, arch, tf32, aligned, cutlass, shared, cuda_path(path)});
  py::dict result;
  result["forward"] = cuda::path_name(plan.forward);
  result["forward_reason"] = plan.forward_reason;
  result["backward"] = cuda::path_name(plan.backward);
  result["backward_reason"] = plan.backward_reason;
  result["epilogue"] = cuda::epilogue_name(plan.epilogue);
  return result;
}

py::dict cuda_step_plan(const std::vector<int64_t>& widths, int64_t batch, const std::string& dtype, int arch,
                        int64_t shared, bool many) {
  check_widths(widths, batch);
  const auto layers = static_cast<int64_t>(widths.size()) - 1;
  const cuda::StepPlan plan =
      cuda::make_step_plan({widths.data(), layers, batch, dtype_named(dtype), arch, shared, many});
  py::dict result;
  result["path"] = cuda::step_path_name(plan.path);
  result["reason"] = plan.reason;
  return result;
}

// The functors of a list: name, and parameters with defaults in the operators' order.
template <class... Functors>
py::dict functors(TypeList<Functors...>) {
  py::dict all;
  const auto add = [&all](const char* name, const auto& parameters) {
    py::dict defaults;
    for (const Parameter& parameter : parameters) defaults[parameter.name] = parameter.value;
    all[name] = defaults;
  };
  (add(Functors::name, Functors::parameters), ...);
  return all;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of mlp_ext: registers torch.ops.mlp_ext and tells how it was built.";
  m.def("activations", [] { return functors(Activations{}); }, "Activations of the operators, with their parameters.");
  m.def("losses", [] { return functors(Losses{}); }, "Losses of mlp_train_step_, with their parameters.");
  m.def("optimizers", [] { return functors(Optimizers{}); }, "Optimizers of mlp_train_step_, with their parameters.");
  m.def("build_info", build_info, "Compiler, torch and instruction sets of this build.");
  m.def(
      "instruction_set", [] { return cpu::variant().name; },
      "The instruction set that the kernels use in this process.");
  m.def("parallel_for_threads", parallel_for_threads, "Distinct threads that ran in one at::parallel_for.");
  m.def(
      "peak_flops",
      [](double seconds, int64_t threads, const std::string& dtype) {
        return cpu::peak_flops(seconds, threads, dtype_named(dtype));
      },
      py::arg("seconds"), py::arg("threads"), py::arg("dtype"), py::call_guard<py::gil_scoped_release>(),
      "Peak FLOP/s, measured in registers: of bfloat16 with AMX that of the tile unit, else of float32 FMAs.");
  m.def("plan", plan, py::arg("M"), py::arg("K"), py::arg("N"), py::arg("item_size"), py::arg("threads"),
        py::arg("mode") = "fma", py::arg("library") = true, py::arg("update") = false, py::arg("machine") = py::none(),
        py::arg("forward") = py::none(), py::arg("backward") = py::none(),
        "The CPU plan of a shape: paths, and in how many (rows, columns, samples) each GEMM is split. mode: how the "
        "dtype is multiplied, fma, bf16_dot (AVX512_BF16) or amx; library: whether torch's GEMM may be used; "
        "update: whether W is updated by dW; machine: whose limits; forward, backward: paths forced where supported.");
  m.def(
      "machines",
      [] {
        py::list names;
        for (const cpu::Machine* m : cpu::machines()) names.append(m->name);
        return names;
      },
      "Names of the machines whose limits are built in.");
  m.def("machine", machine_limits, py::arg("name") = py::none(),
        "The limits of a machine, by default of the one in use: its name, and a dict for each way of multiplying.");
  m.def("use_machine", use_machine, py::arg("limits"),
        "Plans with these limits, a dict like that of machine(), from now on; None: with those of this processor.");
  m.def(
      "force_paths",
      [](const std::optional<std::string>& forward, const std::optional<std::string>& backward) {
        cpu::forced_paths = {cpu_path(forward), cpu_path(backward)};
      },
      py::arg("forward"), py::arg("backward"),
      "Paths of layers on the CPU in this thread, where supported; None: the plan's.");
  m.def(
      "force_dot_mode",
      [](const std::optional<std::string>& name) {
        cpu::forced_dot_mode = name ? std::optional(dot_mode(*name)) : std::nullopt;
      },
      py::arg("mode"), "Overrides how the CPU plan multiplies bfloat16; None: as the processor does.");
  m.def(
      "dot_mode",
      [](const std::string& dtype) { return cpu::kDotModes[static_cast<int>(cpu::dot_mode_of(dtype_named(dtype)))]; },
      py::arg("dtype"), "How the CPU plan multiplies a dtype here: fma, bf16_dot or amx.");
  m.def("step_plan", step_plan, py::arg("widths"), py::arg("batch"), py::arg("item_size"), py::arg("threads"),
        py::arg("mode") = "fma", py::arg("machine") = py::none(),
        "The CPU plan of a training step: its path, and the number of pieces of rows.");
  m.def("many_plan", many_plan, py::arg("widths"), py::arg("batch"), py::arg("item_size"), py::arg("mode") = "fma",
        py::arg("machine") = py::none(), "The CPU plan of training steps of many networks: its path.");
  m.def("cached_bytes", cpu::cached_bytes, "Bytes of freed results cached for reuse.");
  m.def("scratch_bytes", cpu::scratch_bytes, "Bytes of the workspaces that all threads keep.");
  m.def("empty_cache", cpu::empty_cache, py::call_guard<py::gil_scoped_release>(),
        "Frees cached results and the workspaces that no thread uses now.");
  m.def("cuda_plan", cuda_plan, py::arg("M"), py::arg("K"), py::arg("N"), py::arg("dtype"), py::arg("activation"),
        py::arg("arch"), py::arg("tf32") = false, py::arg("aligned") = true, py::arg("cutlass") = true,
        py::arg("shared") = cuda::kBlockShared, py::arg("path") = py::none(),
        "The plan of a shape on a GPU of architecture `arch`, such as 90: paths, and the epilogue of a large GEMM.");
  m.def(
      "force_cuda_path", [](const std::optional<std::string>& path) { cuda::forced_path = cuda_path(path); },
      py::arg("path"), "Overrides the path of layers on a GPU, where supported; None: the plan's.");
  m.def("cuda_step_plan", cuda_step_plan, py::arg("widths"), py::arg("batch"), py::arg("dtype"), py::arg("arch"),
        py::arg("shared"), py::arg("many") = false,
        "The plan of a training step on a GPU with `shared` bytes of shared memory per block; many: of each of many "
        "networks trained at once.");
  bind_guards(m);
  bind_mlp_call(m);
  bind_trainer(m);
  bind_trainers(m);
}

}  // namespace mlp_ext
