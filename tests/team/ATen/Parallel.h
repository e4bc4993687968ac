// Stands for ATen's header: a parallel_for whose threads are fewer than asked for, and late, as the test sets them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace at {

inline thread_local bool in_region = false;
inline thread_local int64_t threads = 1, most_threads = 1;  // asked for; given
inline void (*before_thread)() = nullptr;

inline bool in_parallel_region() { return in_region; }
inline int64_t get_num_threads() { return threads; }
inline void set_num_threads(int64_t number) { threads = number; }

// As ATen's: thread t runs f on range t, and the first exception is thrown again.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  const bool alone = end - begin <= grain || in_region || threads == 1;
  const int64_t count = alone ? 1 : std::min({threads, most_threads, end - begin});
  const int64_t size = (end - begin + count - 1) / count;
  std::exception_ptr error;
  std::mutex mutex;
  const auto run = [&](int64_t t) {
    const bool before = std::exchange(in_region, true);
    try {
      if (begin + t * size < end) f(begin + t * size, std::min(end, begin + (t + 1) * size));
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (!error) error = std::current_exception();
    }
    in_region = before;
  };
  std::vector<std::thread> others;
  for (int64_t t = 1; t < count; ++t)
    others.emplace_back([&run, t] {
      before_thread();
      run(t);
    });
  run(0);
  for (std::thread& other : others) other.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace at
