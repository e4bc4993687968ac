// The activations: forward above backward, the formula on top.
//
// One functor serves float and double, the CPU's vectors and CUDA threads: V needs + - * /, < <=, where(), and the
// functions that the formula names. As a composite of torch's operations it also serves at::Tensor, which has further
// derivatives: where torch has the activation itself, `native` and `native_backward` call it, found by
// argument-dependent lookup, since the formula may be NaN in places where torch's operation and its derivatives are
// not.
#pragma once

#include <cmath>
#include <cstddef>
#include <string>
#include <string_view>
#include <type_traits>

#if defined(__CUDACC__)
#define MLP_EXT_HOST_DEVICE __host__ __device__
#else
#define MLP_EXT_HOST_DEVICE
#endif

namespace mlp_ext {

// As torch.where(condition, value, otherwise), for scalars.
template <class V>
MLP_EXT_HOST_DEVICE V where(bool condition, std::type_identity_t<V> value, V otherwise) {
  return condition ? value : otherwise;
}

// What backward needs beside dy. An activation that needs the pre-activation z (SiLU, GELU) must first add it here,
// and the operators must save it: until then it does not compile.
enum class Saves { nothing, output };

struct Identity {  // y = z,  dz = dy
  static constexpr const char* name = "identity";
  static constexpr Saves saves = Saves::nothing;
  template <class V>
  MLP_EXT_HOST_DEVICE static V forward(V z) {
    return z;
  }
  template <class V>
  MLP_EXT_HOST_DEVICE static V backward(V dy, V) {
    return dy;
  }
};

struct ReLU {  // y = max(z, 0), NaN stays,  dz = dy where y > 0 or y is NaN, else 0
  static constexpr const char* name = "relu";
  static constexpr Saves saves = Saves::output;
  template <class V>
  MLP_EXT_HOST_DEVICE static V forward(V z) {
    return where(z < 0, 0, z);
  }
  template <class V>
  MLP_EXT_HOST_DEVICE static V backward(V dy, V y) {
    return where(y <= 0, 0, dy);
  }
  template <class Tensor>
  static Tensor native(const Tensor& z) {
    return relu(z);
  }
  template <class Tensor>
  static Tensor native_backward(const Tensor& dy, const Tensor& y) {
    return threshold_backward(dy, y, 0);
  }
};

struct Sigmoid {  // y = 1 / (1 + exp(-z)),  dz = dy y (1 - y)
  static constexpr const char* name = "sigmoid";
  static constexpr Saves saves = Saves::output;
  template <class V>
  MLP_EXT_HOST_DEVICE static V forward(V z) {
    using std::exp;
    return 1 / (1 + exp(-z));
  }
  template <class V>
  MLP_EXT_HOST_DEVICE static V backward(V dy, V y) {
    return dy * (1 - y) * y;
  }
  template <class Tensor>
  static Tensor native(const Tensor& z) {
    return sigmoid(z);
  }
  template <class Tensor>
  static Tensor native_backward(const Tensor& dy, const Tensor& y) {
    return sigmoid_backward(dy, y);
  }
};

struct Tanh {  // y = tanh z,  dz = dy (1 - y^2)
  static constexpr const char* name = "tanh";
  static constexpr Saves saves = Saves::output;
  template <class V>
  MLP_EXT_HOST_DEVICE static V forward(V z) {
    using std::tanh;
    return tanh(z);
  }
  template <class V>
  MLP_EXT_HOST_DEVICE static V backward(V dy, V y) {
    return dy * (1 - y * y);
  }
  template <class Tensor>
  static Tensor native(const Tensor& z) {
    return tanh(z);
  }
  template <class Tensor>
  static Tensor native_backward(const Tensor& dy, const Tensor& y) {
    return tanh_backward(dy, y);
  }
};

template <class... Types>
struct TypeList {
  static constexpr size_t size = sizeof...(Types);
};
using Activations = TypeList<Identity, ReLU, Sigmoid, Tanh>;

// The place of a name in Activations; Activations::size if it has none.
template <class... Act>
constexpr size_t activation_index(std::string_view name, TypeList<Act...>) {
  size_t index = 0;
  (void)((name == Act::name ? true : (++index, false)) || ...);
  return index;
}
inline constexpr size_t activation_index(std::string_view name) { return activation_index(name, Activations{}); }

// Calls f with the functor of that place: a run-time name becomes a type once. In device code f is of the device, too.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <class F, class... Act>
MLP_EXT_HOST_DEVICE auto visit_activation(size_t index, F&& f, TypeList<Act...>) {
  using Result = decltype((f(Act{}), ...));
  Result result{};
  size_t place = 0;
  (void)((place++ == index ? (result = f(Act{}), true) : false) || ...);
  return result;
}
template <class F>
auto visit_activation(size_t index, F&& f) {
  return visit_activation(index, f, Activations{});
}

inline bool saves_output(std::string_view name) {
  return visit_activation(activation_index(name), [](auto act) { return act.saves == Saves::output; });
}

// "identity, relu, ..." for messages.
template <class... Act>
std::string activation_names(TypeList<Act...>) {
  std::string names;
  (void)((names += names.empty() ? "" : ", ", names += Act::name), ...);
  return names;
}
inline std::string activation_names() { return activation_names(Activations{}); }

}  // namespace mlp_ext
