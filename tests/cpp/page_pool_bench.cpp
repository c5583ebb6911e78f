// Nanoseconds per page of allocating, appending to and truncating sequences: the best of 20 rounds of each.
#include <algorithm>
#include <chrono>
#include <cstdio>

#include "../../csrc/kv/page_pool.h"

namespace layerskip {
namespace {

template <typename Act>
double BestNanoseconds(int64_t num_pages, Act act) {
  double best = 1e30;
  for (int round = 0; round < 20; ++round) {
    const auto start = std::chrono::steady_clock::now();
    act();
    const std::chrono::duration<double, std::nano> spent = std::chrono::steady_clock::now() - start;
    best = std::min(best, spent.count() / static_cast<double>(num_pages));
  }
  return best;
}

constexpr int64_t kPageSize = 16;
constexpr int64_t kLayers = 30;
constexpr int64_t kPages = 4096;

// One sequence takes `length` positions, `step` at a time, is cut to nothing and freed.
double Life(bool sharing, int64_t length, int64_t step) {
  PoolOptions options;
  if (sharing) options.identity = "model";
  PagePool pool(kPages, kPageSize, kLayers, std::move(options));
  return BestNanoseconds(length / kPageSize, [&] {
    const SequenceId id = pool.AddSequence();
    for (int64_t i = 0; i < length; i += step) pool.Append({id}, {step});
    pool.Truncate(id, 0);
    pool.FreeSequence(id);
  });
}

// The same with commits and names, so that every page taken is one evicted; and prompts found again.
void PrintSharing() {
  PagePool pool(kPages, kPageSize, kLayers, {"model", {}});
  std::vector<int32_t> tokens(kPages * kPageSize);
  int32_t first = 0;
  const double publish = BestNanoseconds(kPages, [&] {
    tokens[0] = ++first;
    const SequenceId id = pool.AddSequence();
    const auto length = static_cast<int64_t>(tokens.size());
    pool.Append({id}, {length});
    pool.RaiseRows({id}, {length}, kLayers);
    pool.Commit({id}, {length});
    pool.Publish(id, tokens);
    pool.FreeSequence(id);
  });
  const double hit = BestNanoseconds(kPages - 1, [&] { pool.FreeSequence(pool.AddSequence(tokens)); });
  std::printf("evict, append, raise, commit, publish, free: %.0f ns per page\n", publish);
  std::printf("find a prompt, free: %.0f ns per page\n", hit);
}

}  // namespace
}  // namespace layerskip

int main() {
  using layerskip::kPages;
  using layerskip::kPageSize;
  for (const bool sharing : {false, true}) {
    for (const int64_t step : {kPageSize, kPages * kPageSize}) {
      std::printf("allocate, append %ld at a time, truncate, free%s: %.0f ns per page\n", static_cast<long>(step),
                  sharing ? " (sharing)" : "", layerskip::Life(sharing, kPages * kPageSize, step));
    }
  }
  layerskip::PrintSharing();
}
