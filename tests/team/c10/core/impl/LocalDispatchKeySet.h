// Stands for c10's header: the keys of a thread are a number.
#pragma once

#include <utility>

namespace c10::impl {

using LocalDispatchKeySet = int;
inline thread_local LocalDispatchKeySet keys = 0;
inline LocalDispatchKeySet tls_local_dispatch_key_set() { return keys; }

struct ForceDispatchKeyGuard {
  explicit ForceDispatchKeyGuard(LocalDispatchKeySet set) : before(std::exchange(keys, set)) {}
  ~ForceDispatchKeyGuard() { keys = before; }
  const LocalDispatchKeySet before;
};

}  // namespace c10::impl
