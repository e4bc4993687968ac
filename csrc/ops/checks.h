// Argument checks shared by the operators. Messages say which argument, what was expected and what was passed.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <ostream>
#include <string>
#include <string_view>

#include "math/activations.h"
#include "math/dtype.h"

namespace mlp_ext {

// An argument that is an element of a list, as "weights[1]".
struct Element {
  const char* list;
  size_t index;
};
inline std::ostream& operator<<(std::ostream& out, const Element& element) {
  return out << element.list << "[" << element.index << "]";
}

inline std::string dtype_name(at::ScalarType dtype) { return std::string(c10::getDtypeNames(dtype).first); }

// The functor of that name with these parameters, or its defaults if `numbers` is empty.
template <class List, class Name>
Chosen<List> check_choice(const char* op, List list, std::string_view functor, at::ArrayRef<double> numbers,
                          const Name& name) {
  const size_t index = index_of(functor, list);
  TORCH_CHECK_VALUE(index < List::size, op, ": ", name, " must be one of ", names_of(list), ", got '", functor, "'");
  return visit(list, index, [&](auto chosen) {
    using Functor = decltype(chosen);
    constexpr size_t count = Functor::parameters.size();
    TORCH_CHECK_VALUE(numbers.empty() || numbers.size() == count, op, ": ", functor, " takes ", count,
                      " parameters, got ", numbers.size());
    std::array<double, count + 1> values{};
    for (size_t i = 0; i < count; ++i) values[i] = numbers.empty() ? Functor::parameters[i].value : numbers[i];
    return Chosen<List>(index, make<Functor>(values.data()));
  });
}

template <class Name>
Activation check_activation(const char* op, std::string_view activation, at::ArrayRef<double> parameters,
                            const Name& name) {
  return check_choice(op, Activations{}, activation, parameters, name);
}

// Splits the concatenated parameters of a stack's activations into layers.
class LayerParameters {
 public:
  LayerParameters(const char* op, at::ArrayRef<double> all) : op_(op), rest_(all), defaults_(all.empty()) {}

  at::ArrayRef<double> next(std::string_view activation) {
    const size_t index = index_of(activation, Activations{});
    if (defaults_ || index == Activations::size) return {};
    const size_t count = visit(Activations{}, index, [](auto act) { return decltype(act)::parameters.size(); });
    TORCH_CHECK_VALUE(count <= rest_.size(), op_, ": parameters must be those of all activations, in order; ",
                      activation, " takes ", count, ", and ", rest_.size(), " are left");
    const at::ArrayRef<double> taken = rest_.slice(0, count);
    rest_ = rest_.slice(count);
    return taken;
  }
  void check_all_taken() const {
    TORCH_CHECK_VALUE(rest_.empty(), op_, ": parameters must be those of all activations, and ", rest_.size(),
                      " are left over");
  }

 private:
  const char* op_;
  at::ArrayRef<double> rest_;
  bool defaults_;
};

template <class Name>
void check_defined(const char* op, const at::Tensor& tensor, const Name& name) {
  TORCH_CHECK_TYPE(tensor.defined(), op, ": ", name, " must be a tensor, got None");
}

// Whether the tensor has elements and kernels would read them at a null pointer. Wrappers of tensors and tensors
// without data, as in tracing, never reach a kernel.
inline bool is_freed(const at::Tensor& t) {
  constexpr auto wrappers =
      c10::python_ks | c10::DispatchKeySet{c10::DispatchKey::Functionalize, c10::DispatchKey::ZeroTensor};
  return t.has_storage() && !t.is_meta() && !t.key_set().has_any(wrappers) &&
         !t.unsafeGetTensorImpl()->storage_initialized();
}

// Checks that the tensor's memory is there.
template <class Name>
void check_allocated(const char* op, const at::Tensor& t, const Name& name) {
  TORCH_CHECK(!is_freed(t), op, ": ", name, " ", t.sizes(), " has no memory: its storage was freed, as by ",
              "untyped_storage().resize_(0); resize the storage and fill it before the call");
}

template <class Name>
void check_dtype(const char* op, const at::Tensor& first, const Name& name) {
  check_defined(op, first, name);
  const auto dtype = first.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf, op, ": ",
              name, " must be float32, float64, bfloat16 or float16, got ", dtype_name(dtype));
  check_allocated(op, first, name);
}

// Whether the elements of a row of [M, columns] are neighbours; those of [M] count as rows of one.
inline bool has_unit_stride(const at::Tensor& t) { return t.dim() == 1 || t.stride(1) == 1 || t.size(1) == 1; }
inline at::Tensor unit_stride(const at::Tensor& t) { return has_unit_stride(t) ? t : t.contiguous(); }

// For tensors that passed check_dtype.
inline DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::float32;
    case at::kDouble:
      return DType::float64;
    case at::kBFloat16:
      return DType::bfloat16;
    default:
      return DType::float16;
  }
}

inline at::ScalarType scalar_type(DType dtype) {
  constexpr at::ScalarType types[] = {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf};
  return types[static_cast<int>(dtype)];
}

// Checks the device and dtype of a tensor that may not be read.
template <class Name, class First>
void check_same_kind(const char* op, const at::Tensor& tensor, const Name& name, const at::Tensor& first,
                     const First& first_name) {
  check_defined(op, tensor, name);
  TORCH_CHECK(tensor.device() == first.device(), op, ": ", name, " must be on ", first.device(), " to match ",
              first_name, ", got ", tensor.device());
  TORCH_CHECK(tensor.scalar_type() == first.scalar_type(), op, ": ", name, " must be ", dtype_name(first.scalar_type()),
              " to match ", first_name, ", got ", dtype_name(tensor.scalar_type()));
}

template <class Name, class First>
void check_like(const char* op, const at::Tensor& tensor, const Name& name, const at::Tensor& first,
                const First& first_name) {
  check_same_kind(op, tensor, name, first, first_name);
  check_allocated(op, tensor, name);
}

// Checks a layer's weight [N, K] and bias [N] or none. `source...` names what K must match.
template <class WeightName, class BiasName, class... Source>
void check_layer(const char* op, const at::Tensor& weight, const WeightName& weight_name,
                 const std::optional<at::Tensor>& bias, const BiasName& bias_name, const at::Tensor& input,
                 const c10::SymInt& K, const Source&... source) {
  check_like(op, weight, weight_name, input, "input");
  TORCH_CHECK(weight.dim() == 2, op, ": ", weight_name, " must be [N, K], got ", weight.sym_sizes());
  TORCH_SYM_CHECK(weight.sym_size(1).sym_eq(K), op, ": ", weight_name, " must be [N, K=", K, "] to match ", source...,
                  ", got ", weight.sym_sizes());
  if (!bias) return;
  const c10::SymInt N = weight.sym_size(0);
  check_like(op, *bias, bias_name, input, "input");
  TORCH_CHECK(bias->dim() == 1, op, ": ", bias_name, " must be [N=", N, "], got ", bias->sym_sizes());
  TORCH_SYM_CHECK(bias->sym_size(0).sym_eq(N), op, ": ", bias_name, " must be [N=", N, "] to match ", weight_name, " ",
                  weight.sym_sizes(), ", got ", bias->sym_sizes());
}

}  // namespace mlp_ext
