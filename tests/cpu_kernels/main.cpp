// Tests the CPU kernels of one instruction set without torch. Prints what is wrong; the last line counts the results.
#include <csignal>

#include "arrays.h"
#include "cpu/machines.h"

namespace mlp_ext::cpu {

namespace {

Report report;

void say_where(int) {
  std::printf("%s: memory past an array's end is touched\n", report.subject.c_str());
  std::fflush(stdout);
  std::_Exit(1);
}

void test_machine() {
  report.subject = "machine";
#if defined(__aarch64__)
  report.check(machine().name == std::string("generic"), machine().name, "is not for this processor");
#endif
  const Limits& limits = machine().fma;
  report.check(limits.block_bytes > 0 || (block_bytes(limits) >= 1 << 14 && block_bytes(limits) <= kMostBlockBytes),
               "block of packed B", std::to_string(block_bytes(limits)) + " bytes");
  report.check(TARGET::fma_loop(10) > 0, "fma_loop");
  report.check(TARGET::tile_loop(10) >= 0, "tile_loop");
}

}  // namespace
}  // namespace mlp_ext::cpu

int main() {
  using namespace mlp_ext::cpu;
  std::signal(SIGSEGV, say_where);
  test_machine();
  for (const auto test : {test_conversions, test_layers, test_steps, test_lanes}) test(report);
  std::printf("%d results, %d wrong\n", report.results, report.wrong);
  return report.wrong != 0;
}
