// The machine that plans are made for: detected, or the user's own.
#pragma once

#include <optional>
#include <span>

#include "cpu/machine.h"
#include "cpu/plan.h"

namespace mlp_ext::cpu {

std::span<const Machine* const> machines();          // built in, generic last
const Machine* find_machine(std::string_view name);  // nullptr if there is none

const Machine& detected_machine();  // of this processor
// The machine in use. use_machine(nullptr) returns to the detected one; `machine` must live on.
const Machine& machine();
void use_machine(const Machine* machine);

// Bytes of L2 that a core has to itself, the least of the CPUs that this process may use.
int64_t l2_per_core();

// Bytes of a block of packed B.
int64_t block_bytes(const Limits& limits);

// Paths forced in this thread, for tests and measurements.
struct ForcedPaths {
  std::optional<Path> forward, backward;
};
inline thread_local ForcedPaths forced_paths;

}  // namespace mlp_ext::cpu
