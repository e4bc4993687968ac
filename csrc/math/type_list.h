// Lists of functors, such as all activations: from a name or an index that is known at run time to the type.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

// On the host always inlined, so that no copy that was compiled for one instruction set serves another.
#if defined(__CUDACC__)
#define MLP_EXT_HOST_DEVICE __host__ __device__ inline
#else
#define MLP_EXT_HOST_DEVICE __attribute__((always_inline)) inline
#endif

namespace mlp_ext {

// As torch.where(condition, value, otherwise), for scalars.
template <class V>
MLP_EXT_HOST_DEVICE V where(bool condition, std::type_identity_t<V> value, V otherwise) {
  return condition ? value : otherwise;
}

// The type of a constant beside V: V itself. PyTorch's tensors specialise it as double.
template <class V>
struct ConstantOf {
  using type = V;
};
template <class V>
using Constant = typename ConstantOf<V>::type;

// A number that a functor is made of, named as PyTorch's module or optimizer names it.
struct Parameter {
  const char* name;
  double value;  // the default
};
template <size_t count>
using Parameters = std::array<Parameter, count>;

template <class... Types>
struct TypeList {
  static constexpr size_t size = sizeof...(Types);
  static constexpr size_t max_parameters = std::max({Types::parameters.size()...});
  static constexpr size_t max_bytes = std::max({sizeof(Types)...});
};

// The index of a name in the list; its size if the name is unknown.
template <class... Types>
constexpr size_t index_of(std::string_view name, TypeList<Types...>) {
  size_t index = 0;
  (void)((name == Types::name ? true : (++index, false)) || ...);
  return index;
}

// An array of f<Type>(), in the order of the list.
template <class... Types, class F>
constexpr auto table_of(TypeList<Types...>, F f) {
  return std::array{f.template operator()<Types>()...};
}

// "identity, relu, ..." for messages.
template <class... Types>
std::string names_of(TypeList<Types...>) {
  std::string names;
  (void)((names += names.empty() ? "" : ", ", names += Types::name), ...);
  return names;
}

// Calls f with the functor of that index, its parameters at their defaults. In device code, f must be a __device__
// function.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <class F, class... Types>
MLP_EXT_HOST_DEVICE auto visit(TypeList<Types...>, size_t index, F&& f) {
  using Result = decltype((f(Types{}), ...));
  size_t i = 0;
  if constexpr (std::is_void_v<Result>) {
    (void)((i++ == index ? (f(Types{}), true) : false) || ...);
  } else {
    Result result{};
    (void)((i++ == index ? (result = f(Types{}), true) : false) || ...);
    return result;
  }
}

// One functor of a list with its parameters, chosen at run time. Trivially copyable, so that kernels take it by value.
// Each list derives a struct of its own from it, which kernels' interfaces can declare without its definition.
template <class List>
struct Chosen {
  size_t index = 0;
  alignas(double) unsigned char bytes[List::max_bytes] = {};

  Chosen() = default;
  template <class T>
  MLP_EXT_HOST_DEVICE Chosen(size_t index, const T& functor) : index(index) {
    static_assert(std::is_trivially_copyable_v<T>);
    std::memcpy(bytes, &functor, sizeof(T));
  }
};

// The functor that was chosen, which must be a T.
template <class T, class List>
MLP_EXT_HOST_DEVICE T get(const Chosen<List>& chosen) {
  T functor;
  std::memcpy(&functor, chosen.bytes, sizeof(T));
  return functor;
}

// A lambda in its place would be checked by nvcc as host code that device code calls.
template <class F, class List>
struct CallWithChosen {
  const Chosen<List>& chosen;
  F& f;
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
  template <class T>
  MLP_EXT_HOST_DEVICE auto operator()(T) const {
    return f(get<T>(chosen));
  }
};

// Calls f with the functor that was chosen.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <class F, class List>
MLP_EXT_HOST_DEVICE auto visit(const Chosen<List>& chosen, F&& f) {
  return visit(List{}, chosen.index, CallWithChosen<F, List>{chosen, f});
}

// The functor T of as many numbers as it has parameters, which are its first members. number(i) converts to them.
template <class T, class F>
T make_of(const F& number) {
  return [&]<size_t... i>(std::index_sequence<i...>) {
    return T{number(i)...};
  }(std::make_index_sequence<T::parameters.size()>{});
}
template <class T>
T make(const double* numbers) {
  struct Number {
    double value;
    operator double() const { return value; }
    operator bool() const { return value != 0; }
  };
  return make_of<T>([&](size_t i) { return Number{numbers[i]}; });
}

template <class List>
Chosen<List> choose(List list, size_t index, const double* numbers) {
  return visit(list, index, [&](auto functor) { return Chosen<List>(index, make<decltype(functor)>(numbers)); });
}

}  // namespace mlp_ext
