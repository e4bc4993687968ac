// One parallel region for many loops. Threads enter it once, and between loops they meet at a light barrier rather than
// at the end of an OpenMP region. Pieces are fixed and claimed, so that a late thread costs one piece at most and bits
// do not depend on timing.
#pragma once

#include <algorithm>
#include <cstdint>

namespace mlp_ext::cpu {

// Number of threads that work is planned for here. The plan, and so the bits, depend on it alone.
int64_t threads();

// While it exists, work of this thread is planned for one thread.
class OnOneThread {
 public:
  OnOneThread();
  ~OnOneThread();
  OnOneThread(const OnOneThread&) = delete;

 private:
  const bool before_;
};

// Whether this thread can run pieces: it has a workspace, or memory for one.
bool can_help();

// Runs body() in this thread, with threads() - 1 helpers for the loops in it. In a region, or with one thread: body().
// Only threads that can help do so, so that a body whose own thread has its workspace does not run out of memory
// halfway.
// at::parallel_for and torch's operators run on one thread in body.
void in_region_of(const void* body, void (*run)(const void* body));
template <class F>
void in_region(const F& body) {
  in_region_of(&body, [](const void* body) { (*static_cast<const F*>(body))(); });
}

template <class F>
void in_region_if(bool has_loops, const F& body) {
  has_loops ? in_region(body) : body();
}

// Runs f(i) for every piece: pieces of a thread's own first, then those that others have not begun. A loop within
// one of several pieces runs on that piece's thread.
void run_pieces(int64_t pieces, const void* f, void (*run)(const void* f, int64_t i));
template <class F>
void for_pieces(int64_t pieces, const F& f) {
  if (pieces <= 1) return pieces == 1 ? f(int64_t(0)) : void();
  run_pieces(pieces, &f, [](const void* f, int64_t i) { (*static_cast<const F*>(f))(i); });
}

// Runs f(begin, end) for ranges of [0, size) with at least `grain` elements each.
template <class F>
void for_ranges(int64_t size, int64_t grain, const F& f) {
  const int64_t pieces = std::clamp<int64_t>(size / std::max<int64_t>(1, grain), 1, threads());
  for_pieces(pieces, [&](int64_t i) { f(i * size / pieces, (i + 1) * size / pieces); });
}

}  // namespace mlp_ext::cpu
