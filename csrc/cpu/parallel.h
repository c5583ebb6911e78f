// One parallel region per op or step, on torch's OpenMP runtime; inside it, phases instead of new regions.
#pragma once

#include <ATen/Parallel.h>
#include <omp.h>
#include <sched.h>

#include <atomic>
#include <cfenv>
#include <chrono>
#include <cstdint>
#include <utility>
#include <vector>

#include "thread_count.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace layerskip {

// The contract rounds to nearest, keeps subnormals and lets no operation trap, whatever torch.set_flush_denormal or
// fesetround set: the whole floating-point mode is the default one while we compute, and the caller's afterwards.
class ContractFloatMode {
 public:
#if defined(__x86_64__)
  ContractFloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(kDefault); }
  ~ContractFloatMode() { _mm_setcsr(saved_); }

 private:
  static constexpr unsigned kDefault = 0x1f80;  // all exceptions masked, no flags, nearest, no flush to zero
  unsigned saved_;
#else
  ContractFloatMode() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~ContractFloatMode() { std::fesetenv(&saved_); }

 private:
  std::fenv_t saved_;
#endif
 public:
  ContractFloatMode(const ContractFloatMode&) = delete;
  ContractFloatMode& operator=(const ContractFloatMode&) = delete;
};

// An op under that mode from its first line to its last: `InContractMode<&op>::Run` has the signature of `op`.
template <auto op>
struct InContractMode;
template <class Result, class... Args, Result (*op)(Args...)>
struct InContractMode<op> {
  static Result Run(Args... args) {
    const ContractFloatMode mode;
    return op(std::forward<Args>(args)...);
  }
};

// A count that belongs to a phase: the phase in the upper half, so that a thread that comes late cannot add to a later
// one. Phases are entered in order, and only when the one before is done.
class PhaseCount {
 public:
  // Adds to the count of `phase`, unless it has reached `most` or a later phase has begun. Returns what it was before;
  // -1: nothing was added.
  int64_t Add(uint32_t phase, int64_t amount, int64_t most) {
    uint64_t seen = value_.load(std::memory_order_acquire);
    for (;;) {
      const auto of = static_cast<uint32_t>(seen >> 32);
      const int64_t count = of == phase ? static_cast<int64_t>(seen & kCount) : 0;
      if (of > phase || count >= most) return -1;
      const uint64_t next = static_cast<uint64_t>(phase) << 32 | static_cast<uint64_t>(count + amount);
      if (value_.compare_exchange_weak(seen, next, std::memory_order_acq_rel)) return count;
    }
  }

  // Whether the count of `phase` has reached `most`, or a later phase has begun.
  bool Reached(uint32_t phase, int64_t most) const {
    const uint64_t seen = value_.load(std::memory_order_acquire);
    const auto of = static_cast<uint32_t>(seen >> 32);
    return of > phase || (of == phase && static_cast<int64_t>(seen & kCount) >= most);
  }

 private:
  static constexpr uint64_t kCount = 0xffffffffu;
  std::atomic<uint64_t> value_{0};
};

// What the threads of one region share: how much of its share each has dealt out, and how many items are done.
struct TeamState {
  struct alignas(64) Padded {
    PhaseCount count;
  };
  explicit TeamState(int64_t threads) : dealt(threads) {}
  std::vector<Padded> dealt;
  Padded done;
};

// The threads of one region, as each of them sees it.
class Team {
 public:
  Team(int64_t rank, int64_t size, TeamState& state) : rank(rank), size(size), state_(state) {}

  // One phase: calls f(begin, end) for runs of at most `piece` of n items, each item once, on whichever thread; returns
  // when all are done and visible to this thread. Every thread has a share of its own and helps with the others' when
  // that is done. Nobody waits for a thread that has nothing in hand: one that loses its core for a while finds the
  // phases over when it comes back, and what it prepares for them is not used.
  template <class F>
  void ForEach(int64_t n, int64_t piece, const F& f) {
    ++phase_;
    items_ += n;
    for (int64_t i = 0; i < size; ++i) {
      const int64_t owner = (rank + i) % size, begin = n * owner / size, end = n * (owner + 1) / size;
      PhaseCount& dealt = state_.dealt[owner].count;
      int64_t done = 0;  // told once a share: all threads write that count, and cores may be far apart
      for (int64_t at; (at = dealt.Add(phase_, piece, end - begin)) >= 0;) {
        const int64_t first = begin + at, last = first + piece < end ? first + piece : end;
        f(first, last);
        done += last - first;
      }
      if (done > 0) state_.done.count.Add(phase_, done, n);
    }
    for (int turns = 0; !state_.done.count.Reached(phase_, n) && n > 0; ++turns) Pause(turns);
  }

  // The items of all phases so far: a measure of the work.
  int64_t items() const { return items_; }

  const int64_t rank, size;

 private:
  // Others are in the middle of a piece, microseconds from its end; or one of them has lost its core, maybe to us.
  static void Pause(int turns) {
    constexpr int kTurns = 2000;
    if (turns < kTurns) {
#if defined(__x86_64__)
      _mm_pause();
#endif
    } else {
      sched_yield();
    }
  }

  TeamState& state_;
  uint32_t phase_ = 0;
  int64_t items_ = 0;
};

// Whether this process was forked from one that had loaded the package: then it computes with one thread.
bool InForkedChild();

// The most threads that a region gets. The runtime may give it fewer (OMP_THREAD_LIMIT, OMP_DYNAMIC, a region inside
// another): what a region does is cut by the size of its team, and only memory for its threads by this number.
inline int64_t NumThreads() { return omp_in_parallel() || InForkedChild() ? 1 : at::get_num_threads(); }

// Runs f(team) on so many threads. f must not throw.
template <class F>
void InParallel(const F& f, int threads = static_cast<int>(NumThreads())) {
  TeamState state(threads);
#pragma omp parallel num_threads(threads)
  {
    const ContractFloatMode mode;
    Team team(omp_get_thread_num(), omp_get_num_threads(), state);
    f(team);
  }
}

// The same for a pass of so many rows, on as many threads as are worth it.
template <class F>
void RunPass(PassKind kind, int64_t rows, const F& f) {
  ThreadCount& count = ThreadCount::Shared();
  const int threads = count.Choose(kind, static_cast<int>(NumThreads()));
  std::atomic<int64_t> lost_cores{0}, page_faults{0}, work{0};
  const auto start = std::chrono::steady_clock::now();
  InParallel(
      [&](Team& team) {
        const ThreadHistory before = HistoryOfThread();
        f(team);
        const ThreadHistory after = HistoryOfThread();
        lost_cores += after.lost_cores - before.lost_cores;
        page_faults += after.page_faults - before.page_faults;
        if (team.rank == 0) work = team.items();
      },
      threads);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  if (page_faults <= kMostPageFaults) count.Note(kind, threads, rows, work, seconds.count(), lost_cores);
}

}  // namespace layerskip
