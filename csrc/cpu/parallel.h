// One parallel region per op or step, on torch's OpenMP runtime; inside it, barriers instead of new regions.
#pragma once

#include <ATen/Parallel.h>
#include <omp.h>

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace layerskip {

struct Range {
  int64_t begin, end;
};

// The contract has no flush to zero, whatever torch.set_flush_denormal says: switched off while we compute.
class ContractFloatMode {
 public:
#if defined(__x86_64__)
  ContractFloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~kFlushBits); }
  ~ContractFloatMode() { _mm_setcsr(saved_); }

 private:
  static constexpr unsigned kFlushBits = 0x8040;
  unsigned saved_;
#endif
};

// The threads of one region, as each of them sees it.
struct Team {
  int64_t rank, size;

  // This thread's contiguous share of n items.
  Range Share(int64_t n) const { return {n * rank / size, n * (rank + 1) / size}; }

  // All threads wait for each other; what one wrote before, all see after.
  void Barrier() const {
#pragma omp barrier
  }
};

// Runs f(team) on every thread. f must not throw.
template <class F>
void InParallel(const F& f) {
  const int threads = omp_in_parallel() ? 1 : at::get_num_threads();
#pragma omp parallel num_threads(threads)
  {
    const ContractFloatMode mode;
    f(Team{omp_get_thread_num(), omp_get_num_threads()});
  }
}

}  // namespace layerskip
