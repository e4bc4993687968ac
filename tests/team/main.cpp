// Loops of random sizes in regions, with late and missing threads, errors, and loops within pieces. Prints what is
// wrong.
#include <ATen/Parallel.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "cpu/team.h"

namespace mlp_ext::cpu {

// Of each thread, in some of the regions.
bool can_help() {
  thread_local std::minstd_rand random(std::hash<std::thread::id>{}(std::this_thread::get_id()));
  return random() % 5 != 0;
}

namespace {

struct Failure {};

std::atomic<int> loops{0};

void check(bool right, const char* what) {
  if (right) return;
  std::printf("%s\n", what);
  std::fflush(stdout);
  std::_Exit(1);
}

void sleep_sometimes() {
  thread_local std::minstd_rand random(std::hash<std::thread::id>{}(std::this_thread::get_id()));
  if (random() % 50 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
}

// Each piece runs once, and all are done when the loop returns. After an error, some may not run.
void loop(int64_t pieces, bool fails) {
  std::vector<int> ran(pieces, 0);
  const auto piece = [&, keys = c10::impl::keys](int64_t i) {
    check(c10::impl::keys == keys, "a thread has other dispatch keys than the first");
    sleep_sometimes();
    std::atomic<int> inner{0};
    if (i % 7 == 0) for_pieces(3, [&](int64_t) { ++inner; });
    check(inner == (i % 7 == 0 ? 3 : 0), "a piece of a loop within a piece did not run once");
    ++ran[i];
    if (fails) throw Failure();
  };
  bool failed = false;
  try {
    for_pieces(pieces, piece);
  } catch (const Failure&) {
    failed = true;
  }
  check(failed == fails, "the error of a piece is lost, or comes late");
  for (const int times : ran) check(times == 1 || (fails && times == 0), "a piece did not run once");
  ++loops;
}

void regions(int seed) {
  std::minstd_rand random(seed);
  for (int region = 0; region < 150; ++region) {
    at::threads = 1 + random() % 7;
    at::most_threads = 1 + random() % at::threads;
    c10::impl::keys = region;
    const int count = random() % 20;
    const bool fails = random() % 5 == 0;
    bool failed = false;
    try {
      in_region([&] {
        for (int i = 0; i < count; ++i) {
          check(threads() == at::threads, "the number of threads changes in a region");
          const int64_t most = random() % 10 == 0 ? 1000 : 20;
          const auto one = [&] { loop(1 + random() % most, random() % 20 == 0); };
          random() % 5 == 0 ? in_region(one) : one();
        }
        if (fails) throw Failure();
      });
    } catch (const Failure&) {
      failed = true;
    }
    check(failed == fails, "the error of a region is lost, or comes late");
    loop(1 + random() % 20, false);
  }
}

}  // namespace
}  // namespace mlp_ext::cpu

int main() {
  using namespace mlp_ext::cpu;
  at::before_thread = sleep_sometimes;
  std::vector<std::thread> callers;
  for (int seed = 1; seed <= 3; ++seed) callers.emplace_back(regions, seed);
  for (std::thread& caller : callers) caller.join();
  std::printf("%d loops are right\n", loops.load());
}
