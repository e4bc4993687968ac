// Input and target of a step: from what users pass to what mlp_train_step_ takes.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <string_view>
#include <utility>
#include <vector>

namespace mlp_ext {

struct StepData {
  at::Tensor input;         // [rows, K]
  at::Tensor target;        // [rows, N], or classes [rows] of int64
  bool promoted = false;    // whether the loss is to be float64, unlike the input
  int64_t rows_of_one = 1;  // rows of input[0]

  bool has_classes() const { return target.scalar_type() == at::kLong; }
};

class StepDataReader {
 public:
  // promotes: whether a float64 target of a float32 model makes the loss float64. flattened: start_dim and end_dim of
  // each Flatten of the input.
  StepDataReader(std::string_view loss, bool promotes, std::vector<std::pair<int64_t, int64_t>> flattened);

  // Throws if a step cannot take them.
  StepData read(const pybind11::object& input, const pybind11::object& target, int64_t K) const;
  // The same for many networks: input [M, K] for all, or [networks, M, K]; the target likewise.
  StepData read_for_many(const pybind11::object& input, const pybind11::object& target, int64_t K) const;

 private:
  StepData read_tensors(const pybind11::object& input, const pybind11::object& target) const;
  void flatten_leading(StepData& data, int64_t K) const;

  const bool takes_classes_, promotes_;
  const std::vector<std::pair<int64_t, int64_t>> flattened_;
};

}  // namespace mlp_ext
