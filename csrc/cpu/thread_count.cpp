#include "thread_count.h"

#if defined(__linux__)
#include <sys/resource.h>
#endif

#include <algorithm>
#include <cmath>

namespace layerskip {

namespace {

// The same, and never 0, for passes of as many rows whose work differs by less than some 9 %.
uint64_t Alike(int64_t rows, int64_t work) {
  const auto octave = static_cast<uint64_t>(8.0 * std::log2(static_cast<double>(std::max<int64_t>(1, work))));
  return (static_cast<uint64_t>(rows) + 1) * 509 + octave;
}

}  // namespace

int ThreadCount::Choose(PassKind kind, int most) {
  const ForkSafeLock lock(mutex_);
  State& state = states_[static_cast<int>(kind)];
  if (state.most != most) {
    state = State{};
    state.most = most;
  }
  return Threads(state, state.trial >= 0 ? state.trial : state.level);
}

void ThreadCount::Note(PassKind kind, int threads, int64_t rows, int64_t work, double seconds, int64_t lost_cores) {
  const ForkSafeLock lock(mutex_);
  State& state = states_[static_cast<int>(kind)];
  const uint64_t alike = Alike(rows, work);
  Known& known = state.known[alike % kNumKnown];
  if (state.trial >= 0) {
    if (threads != Threads(state, state.trial)) return;  // of a pass that began before the trial
    if (known.alike == alike) {
      state.trial_cost += (seconds / known.mean - state.trial_cost) / ++state.trial_passes;
    } else {
      ++state.trial_unlike;
    }
    const bool done = std::max(state.trial_passes, state.trial_unlike) == kTrialPasses;
    if (done || state.trial_cost > kHopeless) EndTrial(state);
    return;
  }
  if (threads != Threads(state, state.level)) return;
  if (known.alike != alike) known = {alike, seconds, seconds};
  known.mean += kLearning * (std::min(seconds, kMost * known.mean) - known.mean);
  known.lowest = std::min(seconds, known.lowest + kRise * known.lowest);
  const bool slow = seconds > kSlow * known.lowest, held_up = static_cast<double>(lost_cores) * kTurn > seconds;
  state.trouble = kForgetting * state.trouble + (held_up || slow ? 1.0 : 0.0);
  ++state.passes;
  StartTrial(state);
}

// Fewer threads where they are held up, and now and then; where there are fewer than all, more, once nothing disturbs
// them any longer.
void ThreadCount::StartTrial(State& state) {
  const bool quiet = state.trouble < kQuiet || state.passes >= kLongestPatience;
  const int down_after = state.trouble > kTrouble ? state.down_patience : state.idle_patience;
  if (Threads(state, state.level) > 1 && state.passes >= down_after) {
    state.trial = state.level + state.down;
    state.down = Threads(state, state.trial) > 1 ? state.down + 1 : 1;
  } else if (state.level > 0 && quiet && state.passes >= state.up_patience) {
    state.trial = state.level - 1;
  }
  state.trial_passes = state.trial_unlike = 0;
  state.trial_cost = 0.0;
}

void ThreadCount::EndTrial(State& state) {
  const bool fewer = state.trial > state.level;
  if (state.trial_passes > 0 && state.trial_cost < kFaster) {
    state.level = state.trial;
    state.down = 1;
    for (Known& known : state.known) known.lowest = known.mean *= state.trial_cost;
    state.down_patience = kDownPatience;
    state.idle_patience = kIdlePatience;
    state.up_patience = kUpPatience;
  } else if (!fewer) {
    state.up_patience = std::min(2 * state.up_patience, kLongestPatience);
  } else if (state.trouble > kTrouble) {
    state.down_patience = std::min(2 * state.down_patience, kLongestPatience);
  } else {
    state.idle_patience = std::min(2 * state.idle_patience, kLongestIdle);
  }
  state.trial = -1;
  state.passes = 0;
  state.trouble = fewer ? 0.0 : state.trouble;
}

ThreadCount& ThreadCount::Shared() {
  static ThreadCount shared;
  return shared;
}

ThreadHistory HistoryOfThread() {
#if defined(__linux__)
  rusage usage{};
  if (getrusage(RUSAGE_THREAD, &usage) == 0) return {usage.ru_nivcsw, usage.ru_minflt};
#endif
  return {};
}

}  // namespace layerskip
