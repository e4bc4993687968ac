// Detects the machine among those of machines/.
#include "cpu/machines.h"

#include <unistd.h>

#include <atomic>

#include "cpu/machines/generic.h"
#include "cpu/machines/sapphire_rapids.h"
#include "cpu/machines/zen4.h"
#include "cpu/machines/zen5.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace mlp_ext::cpu {

namespace {

constexpr const Machine* kMachines[] = {&kZen4, &kZen5, &kSapphireRapids, &kGeneric};

// The processor's vendor and family decide: models of a family share their cores' design.
const Machine& detect() {
#if defined(__x86_64__)
  unsigned eax = 0, vendor[3] = {}, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid(0, &eax, &vendor[0], &vendor[2], &vendor[1])) return kGeneric;
  const std::string_view name(reinterpret_cast<const char*>(vendor), sizeof(vendor));
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return kGeneric;
  const unsigned family = (eax >> 8 & 15) + (eax >> 20 & 255);
  if (name == "AuthenticAMD" && family == 25) return kZen4;  // also Zen 3
  if (name == "AuthenticAMD" && family == 26) return kZen5;
  const bool has_leaf = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
  if (name == "GenuineIntel" && has_leaf && (edx >> 22 & 1)) return kSapphireRapids;  // AMX
#endif
  return kGeneric;
}

std::atomic<const Machine*> chosen{nullptr};

}  // namespace

std::span<const Machine* const> machines() { return kMachines; }

const Machine* find_machine(std::string_view name) {
  for (const Machine* m : kMachines)
    if (name == m->name) return m;
  return nullptr;
}

const Machine& detected_machine() {
  static const Machine& detected = detect();
  return detected;
}

const Machine& machine() {
  const Machine* const own = chosen.load(std::memory_order_acquire);
  return own ? *own : detected_machine();
}

void use_machine(const Machine* machine) { chosen.store(machine, std::memory_order_release); }

int64_t block_bytes(const Limits& limits) {
  static const int64_t l2 = [] {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    if (const int64_t size = sysconf(_SC_LEVEL2_CACHE_SIZE); size > 0) return size;
#endif
    return int64_t(1) << 20;
  }();
  return limits.block_bytes ? limits.block_bytes : std::min(l2 / 2, kMostBlockBytes);
}

}  // namespace mlp_ext::cpu
