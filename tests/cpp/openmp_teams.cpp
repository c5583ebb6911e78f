// What the tests do to the OpenMP runtime that torch and the extension run on, loaded with ctypes: no part of the
// package. Links to the runtime that is in the process already.
#include <fenv.h>
#include <omp.h>

extern "C" {

// The threads that a region gets which asks for `threads`.
int team_size(int threads) {
  int size = 0;
#pragma omp parallel num_threads(threads)
  {
#pragma omp single
    size = omp_get_num_threads();
  }
  return size;
}

// 0: regions get one thread, whatever they ask for. 1: as usual. 2: a region inside another may have several as well.
void set_max_active_levels(int levels) { omp_set_max_active_levels(levels); }

// Calls f(thread) on every thread of a region.
void call_in_team(int threads, void (*f)(int)) {
#pragma omp parallel num_threads(threads)
  f(omp_get_thread_num());
}

// The calling thread's rounding mode, 0..3: to nearest, down, up, to zero; returns the one before.
int set_rounding(int mode) {
  const int modes[] = {FE_TONEAREST, FE_DOWNWARD, FE_UPWARD, FE_TOWARDZERO};
  const int before = fegetround();
  if (fesetround(modes[mode]) != 0) return -1;
  for (int i = 0; i < 4; ++i)
    if (modes[i] == before) return i;
  return -1;
}

}  // extern "C"
