// Threads with sequences of their own on one pool: whatever pages they come to share, each reads back what its own
// tokens wrote. Under ThreadSanitizer this also shows that no page is written while another thread may read it, and
// that every function of the pool holds its lock.
//
// Arguments: threads (4), steps of each (3000), seed (0).
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <functional>
#include <map>
#include <random>
#include <thread>

#include "check.h"

namespace layerskip {
namespace {

constexpr int64_t kPageSize = 3;
constexpr int64_t kLayers = 2;

// What a row holds follows from the tokens up to it, as K and V do.
uint64_t RowAfter(uint64_t before, int32_t token) { return (before ^ (token + 1)) * 0x9e3779b97f4a7c15u; }

class Worker {
 public:
  Worker(PagePool& pool, std::vector<uint64_t>& rows, uint32_t seed) : pool_(pool), rows_(rows), random_(seed) {}

  void Run(int64_t steps) {
    try {
      for (int64_t i = 0; i < steps; ++i) Step();
      while (!texts_.empty()) Free();
    } catch (const std::exception& error) {
      failure = error.what();
    }
  }

  std::string failure;

 private:
  struct Text {
    std::vector<int32_t> tokens;  // the first ones of them are in the pool
    bool salted;
  };

  int64_t Draw(int64_t stop) { return static_cast<int64_t>(random_() % stop); }

  std::map<SequenceId, Text>::iterator Any() { return std::next(texts_.begin(), Draw(texts_.size())); }

  void Step() {
    if (texts_.size() < 2) return Add();
    switch (Draw(8)) {
      case 0:
        return Add();
      case 1:
        return Fork();
      case 2:
        return texts_.size() > 3 ? Free() : Add();
      case 3:
        return Truncate();
      default:
        return Grow();
    }
  }

  void Add() {
    Text text{{}, Draw(4) == 0};
    for (int64_t i = Draw(14); i >= 0; --i) text.tokens.push_back(Draw(8) == 0);
    const SequenceId id = pool_.AddSequence(text.tokens, text.salted ? std::optional("salt") : std::nullopt);
    texts_[id] = text;
    Check(id);
  }

  void Fork() {
    const auto [id, text] = *Any();
    texts_[pool_.Fork(id)] = text;
  }

  void Free() {
    const auto chosen = Any();
    Check(chosen->first);
    pool_.FreeSequence(chosen->first);
    texts_.erase(chosen);
  }

  void Truncate() {
    const SequenceId id = Any()->first;
    pool_.Truncate(id, Draw(pool_.Length(id) + 1));
    Check(id);
  }

  // Some tokens more through the layers, the last ones of them rejected.
  void Grow() {
    auto& [id, text] = *Any();
    const int64_t start = pool_.Length(id), stop = start + 1 + Draw(5);
    try {
      pool_.Append({id}, {stop - start});
    } catch (const CacheFull&) {
      return;
    }
    text.tokens.resize(start);
    for (int64_t i = start; i < stop; ++i) text.tokens.push_back(Draw(8) == 0);
    Write(id, text, start, stop);
    pool_.RaiseRows({id}, {stop}, kLayers);
    const int64_t kept = start + Draw(stop - start + 1);
    pool_.Commit({id}, {kept});
    const auto first = text.tokens.begin() + pool_.NumPublished(id) * kPageSize;
    pool_.Publish(id, {first, text.tokens.begin() + kept / kPageSize * kPageSize});
    Check(id);
  }

  void Write(SequenceId id, const Text& text, int64_t start, int64_t stop) {
    const std::vector<PageId> pages = pool_.Pages(id);
    uint64_t row = 0;
    for (int64_t i = 0; i < stop; ++i) {
      row = RowAfter(row, text.tokens[i]);
      if (i >= start) rows_[pages[i / kPageSize] * kPageSize + i % kPageSize] = row;
    }
  }

  void Check(SequenceId id) {
    const std::vector<int32_t>& tokens = texts_[id].tokens;
    const std::vector<PageId> pages = pool_.Pages(id);
    uint64_t row = 0;
    for (int64_t i = 0; i < pool_.Length(id); ++i) {
      row = RowAfter(row, tokens[i]);
      if (rows_[pages[i / kPageSize] * kPageSize + i % kPageSize] != row) {
        throw std::runtime_error(Concat("sequence ", id, " reads another row at ", i));
      }
    }
  }

  PagePool& pool_;
  std::vector<uint64_t>& rows_;  // what each position of each page holds
  std::mt19937 random_;
  std::map<SequenceId, Text> texts_;
};

// One function at a time, again and again on a thread that calls nothing else, beside one that changes the pool:
// without its lock, nothing orders the two, and ThreadSanitizer sees it.
void TestEachFunction() {
  const std::vector<int32_t> tokens = {1, 0, 1, 0};
  PagePool pool(64, kPageSize, kLayers, PoolOptions{"model", [](PageId, PageId) {}});
  const SequenceId id = pool.AddSequence(), pending = pool.AddSequence();
  pool.Append({pending}, {2});
  std::vector<SequenceId> to_free(300);
  for (SequenceId& each : to_free) each = pool.AddSequence();
  const std::vector<SequenceId> both = {id, pending};
  std::atomic<int64_t> sum{0};  // so that nothing is optimised away
  const std::map<std::string, std::function<void(int)>> functions = {
      {"num_free", [&](int) { sum += pool.num_free(); }},
      {"num_cached", [&](int) { sum += pool.num_cached(); }},
      {"num_available", [&](int) { sum += pool.num_available(); }},
      {"num_sequences", [&](int) { sum += pool.num_sequences(); }},
      {"Stats", [&](int) { sum += pool.Stats().num_owned; }},
      {"AddSequence", [&](int) { sum += pool.AddSequence(tokens); }},
      {"Fork", [&](int) { sum += pool.Fork(id); }},
      {"FreeSequence", [&](int i) { pool.FreeSequence(to_free[i]); }},
      {"Append", [&](int) { pool.Append({id}, {0}); }},
      {"RaiseRows", [&](int) { pool.RaiseRows({pending}, {1}, 1); }},
      {"Commit", [&](int) { pool.Commit({id}, {0}); }},
      {"PagesNeeded", [&](int) { sum += pool.PagesNeeded(both, {1, 2}); }},
      {"Publish", [&](int) { pool.Publish(id, {}); }},
      {"NumPublished", [&](int) { sum += pool.NumPublished(id); }},
      {"Truncate", [&](int) { pool.Truncate(id, 0); }},
      {"Rollback", [&](int) { pool.Rollback(id); }},
      {"Length", [&](int) { sum += pool.Length(id); }},
      {"Committed", [&](int) { sum += pool.Committed(id); }},
      {"Depths", [&](int) { sum += pool.Depths(pending).size(); }},
      {"Pages", [&](int) { sum += pool.Pages(pending).size(); }},
      {"RefCount", [&](int i) { sum += pool.RefCount(i % 64); }},
      {"NameOf", [&](int i) { sum += pool.NameOf(i % 64).has_value(); }},
      {"Lengths", [&](int) { sum += pool.Lengths(both).size(); }},
      {"CommittedLengths", [&](int) { sum += pool.CommittedLengths(both).size(); }},
      {"MakeBlockTable", [&](int) { sum += pool.MakeBlockTable(both).rows; }},
      {"MakePendingDepths", [&](int) { sum += pool.MakePendingDepths(both).starts.size(); }},
      {"CheckIntegrity", [&](int) { pool.CheckIntegrity(); }},
  };
  int32_t next = 0;  // tokens that no text before began with
  for (const auto& [name, call] : functions) {
    std::atomic<bool> done{false};
    std::thread writer([&] {
      for (; !done.load(std::memory_order_relaxed); ++next) {
        const SequenceId text = pool.AddSequence({next, 1, 2, 3});
        pool.Append({text}, {kPageSize + 1});
        pool.RaiseRows({text}, {kPageSize + 1}, kLayers);
        pool.Commit({text}, {kPageSize});
        pool.Publish(text, {next, 1, 2});
        pool.FreeSequence(text);
      }
    });
    for (int i = 0; i < 300; ++i) {
      call(i);
      if (i % 30 == 0) std::this_thread::sleep_for(std::chrono::microseconds(100));  // so that the writer comes by
    }
    done.store(true, std::memory_order_relaxed);
    writer.join();
  }
  pool.CheckIntegrity();
}

void TestThreads(int num_threads, int64_t steps, uint32_t seed) {
  const int64_t num_pages = 12 * num_threads;
  std::vector<uint64_t> rows(num_pages * kPageSize);
  PoolOptions options{"model", [&rows](PageId source, PageId target) {
                        for (int64_t i = 0; i < kPageSize; ++i) {
                          rows[target * kPageSize + i] = rows[source * kPageSize + i];
                        }
                      }};
  PagePool pool(num_pages, kPageSize, kLayers, std::move(options));

  std::vector<Worker> workers;
  for (int i = 0; i < num_threads; ++i) workers.emplace_back(pool, rows, seed + i);
  std::vector<std::thread> threads;
  for (Worker& worker : workers) threads.emplace_back(&Worker::Run, &worker, steps);
  for (int i = 0; i < 50; ++i) pool.CheckIntegrity();
  for (std::thread& thread : threads) thread.join();

  pool.CheckIntegrity();
  for (const Worker& worker : workers) {
    if (!worker.failure.empty()) Fail(Concat(worker.failure, " (seed ", seed, ")"));
  }
  const PoolStats stats = pool.Stats();
  ExpectEqual("pages that came back", stats.num_free + stats.num_cached, num_pages);
  for (const auto& [name, count] : {std::pair("hits", stats.hit_tokens), std::pair("evictions", stats.num_evictions),
                                    std::pair("copies", stats.num_copies)}) {
    if (count == 0) Fail(Concat("the test saw no ", name));
  }
}

}  // namespace
}  // namespace layerskip

int main(int argc, char** argv) {
  const auto argument = [&](int i, int64_t otherwise) { return argc > i ? std::atoll(argv[i]) : otherwise; };
  layerskip::TestEachFunction();
  layerskip::TestThreads(argument(1, 4), argument(2, 3000), argument(3, 0));
  return layerskip::num_failures;
}
