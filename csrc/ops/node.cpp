#include "ops/node.h"

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/version.h>

namespace mlp_ext {
namespace {

using torch::autograd::CompiledNodeArgs;
using torch::autograd::SavedVariable;
using torch::autograd::SwapSavedVariables;
using torch::autograd::variable_list;
namespace compiled = torch::dynamo::autograd;

class OperatorNode final : public torch::autograd::TraceableFunction {
 public:
  OperatorNode(const Derivative& derivative, Settings settings)
      : derivative_(derivative), settings_(std::move(settings)) {}

  std::string name() const override { return derivative_.name; }

  void save(const variable_list& tensors) {
    saved_.reserve(tensors.size());
    for (const at::Tensor& t : tensors) {
      const bool is_output = t.defined() && torch::autograd::impl::grad_fn_unsafe(t) == this;
      saved_.emplace_back(t, is_output);
    }
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return derivative_.backward(grads, saved(), settings_, needed());
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& s : saved_) s.reset_data();
  }

  // Compiled autograd: the cache key of this node, and its code in the compiled graph.
  void compiled_args(CompiledNodeArgs& args) const override {
    args.collect(std::string(derivative_.name));
    args.collect(settings_.activations);
    args.collect(settings_.parameters);
    args.collect(saved_, true);  // true: unpack as outputs of this node
  }

  variable_list apply_with_saved(const variable_list& grads, SwapSavedVariables& swap) override {
    swap.before(saved_);
    compiled::PackedArgs packed;
    packed.pack(saved());
    packed.pack(settings_.activations);
    packed.pack(c10::IValue(settings_.parameters));
    packed.pack(needed());
    std::vector<at::TypePtr> types;
    for (const c10::IValue& arg : packed.vec())
      types.push_back(arg.isTensor() ? at::TypePtr(at::TensorType::get()) : arg.type());
    const auto backward = [d = derivative_](const variable_list& grads, const std::vector<c10::IValue>& values) {
      compiled::PackedArgs packed(values);
      const auto saved = packed.unpack<variable_list>();
      const auto activations = packed.unpack<c10::IValue>();
      const auto parameters = packed.unpack<c10::IValue>().toDoubleVector();
      return d.backward(grads, saved, {activations, parameters}, packed.unpack<std::vector<bool>>());
    };
    const auto& python = compiled::getPyCompilerInterface();
    const std::string bound = python->bind_function(swap.get_py_compiler(), derivative_.name, backward, types,
                                                    /*is_custom_function=*/true, /*is_traceable=*/true);
    const c10::IValue metadata =
        compiled::IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
            compiled::get_input_metadata(next_edges()));
    variable_list result =
        python->call_function(swap.get_py_compiler(), "apply_functional", bound, grads, packed.vec(), metadata);
    swap.after(saved_);
    return result;
  }

 private:
  variable_list saved() {
    variable_list tensors;
    tensors.reserve(saved_.size());
    for (const SavedVariable& s : saved_) tensors.push_back(s.unpack(getptr()));
    return tensors;
  }

  std::vector<bool> needed() const {
    std::vector<bool> result(num_outputs());
    for (size_t i = 0; i < result.size(); ++i) result[i] = task_should_compute_output(i);
    return result;
  }

  const Derivative& derivative_;
  const Settings settings_;
  std::vector<SavedVariable> saved_;
};

auto make_node(const Derivative& derivative, Settings settings) {
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 13
  return std::shared_ptr<OperatorNode>(new OperatorNode(derivative, std::move(settings)), torch::autograd::deleteNode);
#else
  return c10::make_intrusive<OperatorNode>(derivative, std::move(settings));
#endif
}

}  // namespace

void record(const Derivative& derivative, Settings settings, const variable_list& inputs, const variable_list& outputs,
            const variable_list& saved) {
  const auto node = make_node(derivative, std::move(settings));
  node->set_next_edges(torch::autograd::collect_next_edges(inputs));
  torch::autograd::set_history(outputs, node);
  node->save(saved);
}

}  // namespace mlp_ext
