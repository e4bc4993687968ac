// Ctrl-C during long calls without the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>

namespace mlp_ext {

class Signals {
 public:
  using Clock = std::chrono::steady_clock;
  static constexpr auto kInterval = std::chrono::milliseconds(50);

  // Runs Python's signal handlers, at most once per interval; throws what they raise. Call without the GIL.
  void check() {
    const auto now = Clock::now();
    if (now - last_ <= kInterval) return;
    last_ = now;
    const pybind11::gil_scoped_acquire gil;
    if (PyErr_CheckSignals()) throw pybind11::error_already_set();
  }

 private:
  Clock::time_point last_ = Clock::now();
};

}  // namespace mlp_ext
