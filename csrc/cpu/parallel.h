// One parallel region per op or step, on torch's OpenMP runtime; inside it, phases instead of new regions.
#pragma once

#include <ATen/Parallel.h>
#include <omp.h>

#include <atomic>
#include <cstdint>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace layerskip {

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

// How much of its share each thread has dealt out, in two phases: the one at hand and, cleared for it, the next.
struct alignas(64) Dealt {
  std::atomic<int64_t> items[2] = {{0}, {0}};
};

// The threads of one region, as each of them sees it.
class Team {
 public:
  Team(int64_t rank, std::vector<Dealt>& dealt) : rank(rank), size(static_cast<int64_t>(dealt.size())), dealt_(dealt) {}

  // One phase: calls f(begin, end) for runs of at most `piece` of n items, each item once, on whichever thread; then
  // waits until all are done and visible to all. Every thread has a share of its own and helps with the others' when
  // that is done: one that loses its core for a while keeps nobody waiting for more than a piece.
  template <class F>
  void ForEach(int64_t n, int64_t piece, const F& f) {
    dealt_[rank].items[~phase_ & 1].store(0, std::memory_order_relaxed);
    for (int64_t i = 0; i < size; ++i) {
      const int64_t owner = (rank + i) % size, begin = n * owner / size, end = n * (owner + 1) / size;
      std::atomic<int64_t>& dealt = dealt_[owner].items[phase_ & 1];
      for (int64_t at; (at = begin + dealt.fetch_add(piece, std::memory_order_relaxed)) < end;)
        f(at, at + piece < end ? at + piece : end);
    }
    ++phase_;
#pragma omp barrier
  }

  const int64_t rank, size;

 private:
  std::vector<Dealt>& dealt_;
  int64_t phase_ = 0;
};

inline int64_t NumThreads() { return omp_in_parallel() ? 1 : at::get_num_threads(); }

// Runs f(team) on every thread. f must not throw.
template <class F>
void InParallel(const F& f) {
  const auto threads = static_cast<int>(NumThreads());
  std::vector<Dealt> dealt(threads);
#pragma omp parallel num_threads(threads)
  {
    const ContractFloatMode mode;
    Team team(omp_get_thread_num(), dealt);
    f(team);
  }
}

}  // namespace layerskip
