// The rule by which passes get their number of threads, with passes whose cost is told: no clock, no other process.
//
//     thread_count.cpp ../../csrc/cpu/thread_count.cpp
#include "../../csrc/cpu/thread_count.h"

#include <cstdio>
#include <functional>
#include <memory>

namespace layerskip {
namespace {

int num_failures = 0;

void Expect(bool right, const char* what) {
  if (right) return;
  std::printf("%s\n", what);
  ++num_failures;
}

struct Passes {
  std::function<double(int threads)> seconds;
  std::function<int(int threads)> lost_cores;
};

// A machine to ourselves; one where a second thread waits for its core, which the kernel counts or does not.
double Fast(int threads) { return 0.008 / threads; }
double HeldUp(int threads) { return threads > 1 ? 0.064 : 0.016; }
const Passes kAlone{Fast, [](int) { return 0; }};
const Passes kCounted{HeldUp, [](int threads) { return threads > 1 ? 10 : 0; }};
const Passes kUncounted{HeldUp, [](int) { return 0; }};

// The share of so many passes that had `threads` threads.
double Share(ThreadCount& count, const Passes& passes, int number, int threads, int most = 4) {
  int those = 0;
  for (int i = 0; i < number; ++i) {
    const int given = count.Choose(PassKind::kVerifyFewRows, most);
    those += given == threads;
    count.Note(PassKind::kVerifyFewRows, given, 1, 1000, passes.seconds(given), passes.lost_cores(given));
  }
  return static_cast<double>(those) / number;
}

void AloneAllAreUsed() {
  ThreadCount count;
  Expect(Share(count, kAlone, 1000, 4) > 0.98, "alone: at least 98 % of 1,000 passes have all threads");
  Expect(Share(count, kAlone, 20000, 4) > 0.998, "alone: at least 99.8 % of the later ones");
}

void OneSlowPassChangesNothing() {
  ThreadCount count;
  Share(count, kAlone, 100, 4);
  int pass = 0;
  const Passes rarely_slow{[&](int threads) { return ++pass % 50 ? Fast(threads) : 0.08; }, [](int) { return 0; }};
  Expect(Share(count, rarely_slow, 1000, 4) > 0.95, "one slow pass of 50: 95 % still have all threads");
}

// A pass of 256 rows of a prompt is long enough to lose its core now and then to whatever a quiet machine does.
void LongPassesLoseTheirCoresNowAndThen() {
  ThreadCount count;
  const Passes prompts{[](int threads) { return 0.4 / threads; }, [](int) { return 3; }};
  Expect(Share(count, prompts, 64, 4) > 0.95, "long passes: 95 % of the first 64 have all threads");
}

void FewerWhereTheyAreHeldUp() {
  for (const Passes* busy : {&kCounted, &kUncounted}) {
    ThreadCount from_the_start;
    Share(from_the_start, *busy, 100, 1);
    Expect(Share(from_the_start, *busy, 1000, 1) > 0.95, "busy from the start: after 100 passes one thread");

    ThreadCount later;
    Share(later, kAlone, 10000, 4);
    Share(later, *busy, 30, 1);
    Expect(Share(later, *busy, 1000, 1) > 0.95, "busy after 10,000 passes alone: after 30 more one thread");
    Share(later, kAlone, 600, 4);
    Expect(Share(later, kAlone, 1000, 4) > 0.95, "alone again: after 600 passes all threads");
  }
}

// Drafts and batches of all sizes in turn, few passes of each: what a pass takes for its work differs by up to five
// times, and the second thread is worth a third.
void PassesAreComparedWithOthersLikeThem() {
  ThreadCount count;
  constexpr int kPasses = 20000;
  int with_all = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    const int rows = 16 - pass / 4 % 14, given = count.Choose(PassKind::kVerifySomeRows, 2);
    with_all += given == 2;
    const double chance = pass % 97 == 0 ? 8.0 : 1.0, seconds = 2e-3 * rows * chance / (given == 2 ? 1.33 : 1.0);
    count.Note(PassKind::kVerifySomeRows, given, rows, 10000 + 10 * rows, seconds, 0);
  }
  Expect(with_all > 0.99 * kPasses, "passes of many kinds: 99 % have all threads");
}

void NewMemoryIsCounted() {
  const int64_t before = HistoryOfThread().page_faults;
  constexpr size_t kBytes = size_t{64} << 20;
  const std::unique_ptr<char[]> memory(new char[kBytes]);
  for (size_t i = 0; i < kBytes; i += 4096) memory[i] = 1;
  Expect(HistoryOfThread().page_faults - before > kMostPageFaults, "64 MB of new memory are a pass that is not judged");
}

void AnotherNumberBeginsAnew() {
  ThreadCount count;
  Share(count, kUncounted, 200, 1);
  Expect(count.Choose(PassKind::kVerifyFewRows, 2) == 2, "another number of threads: all of them at first");
  Expect(count.Choose(PassKind::kDraft, 4) == 4, "another kind of pass: a number of its own");
}

}  // namespace
}  // namespace layerskip

int main() {
  layerskip::AloneAllAreUsed();
  layerskip::OneSlowPassChangesNothing();
  layerskip::LongPassesLoseTheirCoresNowAndThen();
  layerskip::FewerWhereTheyAreHeldUp();
  layerskip::PassesAreComparedWithOthersLikeThem();
  layerskip::NewMemoryIsCounted();
  layerskip::AnotherNumberBeginsAnew();
  return layerskip::num_failures;
}
