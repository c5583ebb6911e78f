// What a fork leaves of OpenMP: nothing. Its threads are the parent's, and a region that wants them waits for ever.
#include "parallel.h"

#include <pthread.h>

namespace layerskip {

namespace {

std::atomic<bool> forked{false};
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

bool InForkedChild() { return forked; }

}  // namespace layerskip
