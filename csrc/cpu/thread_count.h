// How many threads a pass is given: all of torch's, unless other processes take the cores and fewer are faster.
//
// A phase of a pass ends when the last thread is done, so a thread that loses its core holds up all the others. Where
// that happens, fewer threads are tried, and kept if they are faster; later, more are tried again. A pass was
// disturbed if it lost a core at least once in every kTurn seconds, as the kernel counts, or if it took much longer
// than passes like it; since neither sees all (a kernel may not count, and a machine may have been busy from the
// start), fewer are also tried now and then. Only passes that are alike are compared: of as many rows, and about as
// much work. No number of threads changes a bit. Torch-free.
#pragma once

#include <cstdint>

#include "fork_safe_mutex.h"

namespace layerskip {

// Each kind has a number of threads of its own.
enum class PassKind { kDraft, kVerifyFewRows, kVerifySomeRows, kVerifyManyRows };
inline constexpr int kNumPassKinds = 4;

inline PassKind VerifyKind(int64_t rows) {
  return rows <= 2 ? PassKind::kVerifyFewRows : rows <= 16 ? PassKind::kVerifySomeRows : PassKind::kVerifyManyRows;
}

class ThreadCount {
 public:
  // The threads of the next pass of a kind, 1..most.
  int Choose(PassKind kind, int most);
  // What a pass cost with the threads that Choose gave: `work` in any unit; `lost_cores`: how often one lost its core.
  void Note(PassKind kind, int threads, int64_t rows, int64_t work, double seconds, int64_t lost_cores);

  // What the passes of this process are chosen by.
  static ThreadCount& Shared();

 private:
  static constexpr int kDownPatience = 2, kIdlePatience = 32, kUpPatience = 8, kTrialPasses = 6;
  static constexpr int kLongestPatience = 512, kLongestIdle = 4096, kNumKnown = 64;
  static constexpr double kForgetting = 0.8, kLearning = 0.2, kTrouble = 1.5, kQuiet = 0.2;
  static constexpr double kFaster = 0.9, kHopeless = 1.25;  // a trial's cost: better, given up
  static constexpr double kSlow = 2.0, kRise = 1.0 / 64.0;  // a disturbed pass takes kSlow * lowest; lowest forgets
  static constexpr double kMost = 4.0;   // one pass, however slow, counts as so many times the mean: it may be chance
  static constexpr double kTurn = 0.01;  // seconds; a quiet machine takes a core away now and then, but not so often

  // Passes that are alike, and the seconds that one takes at the present level: on average, and at best, lately.
  struct Known {
    uint64_t alike = 0;  // what they have in common; 0: none were seen
    double mean = 0.0, lowest = 0.0;
  };
  // Levels are most, most / 2, most / 4, ..., 1.
  struct State {
    int most = 0, level = 0, trial = -1;  // trial: the level that is being tried; -1: none
    int trial_passes = 0, passes = 0;     // since the trial began, and since the last one ended
    int trial_unlike = 0;                 // passes of the trial that none before were like
    int down = 1;                         // how many levels the next trial of fewer threads goes down
    // Passes before the next trial: of fewer threads where passes are disturbed, and where they are not; of more.
    int down_patience = kDownPatience, idle_patience = kIdlePatience, up_patience = kUpPatience;
    double trial_cost = 0.0;  // seconds of the trial's passes over those of passes like them
    double trouble = 0.0;     // disturbed passes, the recent ones counting most
    Known known[kNumKnown];
  };
  static int Threads(const State& state, int level) { return state.most >> level > 1 ? state.most >> level : 1; }
  static void StartTrial(State& state);
  static void EndTrial(State& state);

  ForkSafeMutex mutex_;
  State states_[kNumPassKinds];
};

// What befell this thread so far, as the kernel counts: how often it lost its core to another, and touched new memory.
struct ThreadHistory {
  int64_t lost_cores = 0, page_faults = 0;
};
ThreadHistory HistoryOfThread();

// A pass with more page faults spent its time on new memory and says nothing of threads: the first ones on a new cache.
inline constexpr int64_t kMostPageFaults = 16;

}  // namespace layerskip
