// One parallel region per op or step, on torch's OpenMP runtime; inside it, barriers instead of new regions.
#pragma once

#include <ATen/Parallel.h>
#include <omp.h>

#include <atomic>
#include <cstdint>
#include <thread>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
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

// Spins for some microseconds, as long as a phase of a step may take, and then sleeps: a thread that waits must
// not keep the one it waits for from its processor. (libgomp's barrier spins for milliseconds.)
class SpinThenSleepBarrier {
 public:
  void SetThreads(int32_t threads) { threads_ = threads; }

  void Wait() {
    const int32_t round = round_.load();
    if (arrived_.fetch_add(1) + 1 == threads_) {
      arrived_.store(0);
      round_.store(round + 1);
      if (sleepers_.load() > 0) WakeAll();
      return;
    }
    for (int i = 0; i < kSpins; ++i) {
      if (round_.load(std::memory_order_acquire) != round) return;
      Pause();
    }
    sleepers_.fetch_add(1);
    while (round_.load() == round) SleepWhile(round);
    sleepers_.fetch_sub(1);
  }

 private:
  static constexpr int kSpins = 4000;

  static void Pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

#if defined(__linux__)
  void SleepWhile(int32_t round) { syscall(SYS_futex, &round_, FUTEX_WAIT_PRIVATE, round, nullptr, nullptr, 0); }
  void WakeAll() { syscall(SYS_futex, &round_, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0); }
#else
  void SleepWhile(int32_t) { std::this_thread::yield(); }
  void WakeAll() {}
#endif

  int32_t threads_ = 1;
  alignas(64) std::atomic<int32_t> arrived_{0};
  alignas(64) std::atomic<int32_t> round_{0};
  std::atomic<int32_t> sleepers_{0};
};

// The threads of one region, as each of them sees it.
struct Team {
  int64_t rank, size;
  SpinThenSleepBarrier* barrier;

  // This thread's contiguous share of n items.
  Range Share(int64_t n) const { return {n * rank / size, n * (rank + 1) / size}; }

  // All threads wait for each other; what one wrote before, all see after.
  void Barrier() const { barrier->Wait(); }
};

// Runs f(team) on every thread. f must not throw.
template <class F>
void InParallel(const F& f) {
  const int threads = omp_in_parallel() ? 1 : at::get_num_threads();
  SpinThenSleepBarrier barrier;
#pragma omp parallel num_threads(threads)
  {
// OpenMP may give fewer threads than asked for.
#pragma omp single
    barrier.SetThreads(omp_get_num_threads());
    const ContractFloatMode mode;
    f(Team{omp_get_thread_num(), omp_get_num_threads(), &barrier});
  }
}

}  // namespace layerskip
