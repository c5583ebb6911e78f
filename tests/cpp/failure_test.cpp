// Check, then act: each call with the host's memory running out at every allocation in turn, and with copying pages
// failing at every page in turn, leaves the pool as it was.
#include <cstdlib>
#include <new>
#include <sstream>

#include "check.h"

namespace {
int64_t allocations_left = -1;  // until one fails; negative: none does
}  // namespace

void* operator new(size_t size) {
  if (allocations_left == 0) throw std::bad_alloc();
  if (allocations_left > 0) --allocations_left;
  if (void* memory = std::malloc(size == 0 ? 1 : size)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace layerskip {
namespace {

// All that can be seen of a pool with the sequences 0 to 4.
std::string Snapshot(const PagePool& pool) {
  std::ostringstream out;
  out << pool.num_free() << ' ' << pool.num_cached() << ' ' << pool.num_sequences() << '\n';
  for (SequenceId id = 0; id < 5; ++id) {
    out << id << ": " << pool.Committed(id) << ' ' << pool.NumPublished(id) << ';';
    for (const PageId page : pool.Pages(id)) out << ' ' << page;
    for (const int32_t depth : pool.Depths(id)) out << ", " << depth;
    out << '\n';
  }
  for (int64_t page = 0; page < pool.num_pages(); ++page) out << pool.RefCount(page) << pool.NameOf(page).has_value();
  const PoolStats stats = pool.Stats();
  out << '\n'
      << stats.queried_tokens << ' ' << stats.hit_tokens << ' ' << stats.num_evictions << ' ' << stats.num_copies;
  return out.str();
}

// Pages of 2 rows. 0 and its forks 1, 2 share three pages, the last one half full; 3 has pending rows; 4 has full
// pages that are not published; two pages are cached.
void FillPool(PagePool& pool) {
  Fill(pool, pool.AddSequence(), {1, 2, 3, 4, 5});
  pool.Fork(0);
  pool.Fork(1);
  pool.Append({pool.AddSequence()}, {3});
  const SequenceId full = pool.AddSequence();
  pool.Append({full}, {4});
  pool.RaiseRows({full}, {4}, 2);
  pool.Commit({full}, {4});
  const SequenceId cached = pool.AddSequence();
  Fill(pool, cached, {9, 9, 9, 9});
  pool.FreeSequence(cached);
}

using Act = std::function<void(PagePool&)>;

const std::pair<const char*, Act> kActs[] = {
    {"add", [](PagePool& pool) { pool.AddSequence(); }},
    {"add with a hit", [](PagePool& pool) { pool.AddSequence({9, 9, 9, 9, 9}); }},
    {"add with a salt", [](PagePool& pool) { pool.AddSequence({9, 9, 9, 9, 9}, std::string(100, 's')); }},
    {"fork", [](PagePool& pool) { pool.Fork(0); }},
    {"append with copies", [](PagePool& pool) { pool.Append({0, 1, 2}, {1, 1, 1}); }},
    {"append with evictions", [](PagePool& pool) { pool.Append({0, 3, 4}, {9, 9, 9}); }},
    {"append without room", [](PagePool& pool) { pool.Append({0, 3}, {100, 1}); }},
    {"raise", [](PagePool& pool) { pool.RaiseRows({3, 0}, {2, 5}, 1); }},
    {"commit", [](PagePool& pool) { pool.Commit({3, 0}, {0, 5}); }},
    {"publish", [](PagePool& pool) { pool.Publish(4, {6, 6, 6, 6}); }},
    {"truncate", [](PagePool& pool) { pool.Truncate(0, 1); }},
    {"roll back", [](PagePool& pool) { pool.Rollback(3); }},
    {"bad call", [](PagePool& pool) { pool.Append({0, 3}, {1, -1}); }},
};

void TestOutOfMemory(const char* name, const Act& act) {
  for (int64_t count = 0;; ++count) {
    PagePool pool(16, 2, 2, {"model", {}});
    FillPool(pool);
    const std::string before = Snapshot(pool);
    allocations_left = count;
    bool failed = false;
    try {
      act(pool);
    } catch (const std::bad_alloc&) {
      failed = true;
    } catch (const std::exception&) {  // what the call throws anyway
    }
    allocations_left = -1;
    pool.CheckIntegrity();
    if (!failed) return;
    ExpectEqual(Concat(name, " out of memory at allocation ", count), Snapshot(pool), before);
  }
}

void TestCopyFails() {
  int64_t copies_left = 0;
  const auto copy_page = [&copies_left](PageId, PageId) {
    if (copies_left-- == 0) throw std::runtime_error("no copy");
  };
  // Two of the three owners of the half-full page need a copy.
  for (int64_t count = 0; count <= 2; ++count) {
    PagePool pool(16, 2, 2, {"model", copy_page});
    FillPool(pool);
    const std::string before = Snapshot(pool);
    copies_left = count;
    const auto message = MessageOf<std::runtime_error>([&] { pool.Append({0, 1, 2}, {1, 1, 1}); });
    ExpectEqual(Concat("copy ", count), message, count < 2 ? "no copy" : "no error");
    ExpectEqual(Concat("changed by copy ", count), Snapshot(pool) == before, count < 2);
    pool.CheckIntegrity();
  }
}

}  // namespace
}  // namespace layerskip

int main() {
  for (const auto& [name, act] : layerskip::kActs) layerskip::TestOutOfMemory(name, act);
  layerskip::TestCopyFails();
  return layerskip::num_failures;
}
