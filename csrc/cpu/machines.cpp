// Detects the machine among those of machines/.
#include "cpu/machines.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>

#include "cpu/machines/generic.h"
#include "cpu/machines/sapphire_rapids.h"
#include "cpu/machines/zen3.h"
#include "cpu/machines/zen4.h"
#include "cpu/machines/zen5.h"

#include "cpu/kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mlp_ext::cpu {

namespace {

constexpr const Machine* kMachines[] = {&kZen3, &kZen4, &kZen5, &kSapphireRapids, &kGeneric};

// The processor's vendor and family decide: models of a family share their cores' design.
const Machine& detect() {
#if defined(__x86_64__)
  unsigned eax = 0, vendor[3] = {}, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid(0, &eax, &vendor[0], &vendor[2], &vendor[1])) return kGeneric;
  const std::string_view name(reinterpret_cast<const char*>(vendor), sizeof(vendor));
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return kGeneric;
  const unsigned family = (eax >> 8 & 15) + (eax >> 20 & 255);
  const bool has_leaf = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
  if (name == "AuthenticAMD" && family == 25) return has_leaf && (ebx >> 16 & 1) ? kZen4 : kZen3;  // AVX-512
  if (name == "AuthenticAMD" && family == 26) return kZen5;
  if (name == "GenuineIntel" && has_leaf && (edx >> 22 & 1)) return kSapphireRapids;  // AMX
#endif
  return kGeneric;
}

std::string line_of(const std::string& file) {
  std::ifstream stream("/sys/devices/system/cpu/" + file);
  std::string line;
  std::getline(stream, line);
  return line;
}

// Number of CPUs in a list such as "0-3,8".
int64_t count_of_list(const std::string& list) {
  int64_t count = 0;
  std::istringstream parts(list);
  for (std::string part; std::getline(parts, part, ',');) {
    const char* const begin = part.c_str();
    const char* const dash = std::strchr(begin, '-');
    count += dash ? std::atoll(dash + 1) - std::atoll(begin) + 1 : 1;
  }
  return count;
}

// A core's share of the L2 cache of a CPU; 0 if Linux does not say. Efficiency cores share one, and hyperthreads are
// one core.
int64_t l2_share(int cpu) {
  const std::string folder = "cpu" + std::to_string(cpu) + "/";
  const std::string size = line_of(folder + "cache/index2/size");  // such as 1024K
  const int64_t sharing = count_of_list(line_of(folder + "cache/index2/shared_cpu_list"));
  const int64_t siblings = count_of_list(line_of(folder + "topology/thread_siblings_list"));
  const int64_t unit = size.empty() ? 0 : size.back() == 'K' ? 1 << 10 : size.back() == 'M' ? 1 << 20 : 1;
  return std::atoll(size.c_str()) * unit / std::max<int64_t>(1, sharing / std::max<int64_t>(1, siblings));
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

int64_t l2_per_core() {
  static const int64_t bytes = [] {
    cpu_set_t allowed;
    int64_t least = 0;
    if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0)
      for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
        if (CPU_ISSET(cpu, &allowed))
          if (const int64_t size = l2_share(cpu); size > 0) least = least ? std::min(least, size) : size;
    return least ? least : int64_t(1) << 20;
  }();
  return bytes;
}

int64_t block_bytes(const Limits& limits) {
  return limits.block_bytes ? limits.block_bytes : std::clamp(l2_per_core() / 2, kLeastBlockBytes, kMostBlockBytes);
}

bool multiplies_bfloat16() {
#if defined(__x86_64__)
  static const bool has_it = __builtin_cpu_supports("avx512bf16");
  return has_it;
#else
  return false;
#endif
}

bool multiplies_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  static const bool has_them = [] {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    // Not all compilers' __builtin_cpu_supports know AMX. Bits: amx-bf16 and amx-tile.
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx >> 22 & 1) == 0 || (edx >> 24 & 1) == 0) return false;
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, of asm/prctl.h
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return has_them;
#else
  return false;
#endif
}

}  // namespace mlp_ext::cpu
