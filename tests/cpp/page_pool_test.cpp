// What Python cannot reach: CheckIntegrity sees each kind of damage, and a free page cannot be released.
// Built and run by tests/test_page_pool.py; exits with the number of failures.
#include "../../csrc/kv/page_pool.h"

#include <cstdio>
#include <functional>
#include <stdexcept>
#include <string>

namespace layerskip {

struct PagePoolPeer {
  PagePool& pool;
  std::vector<int32_t>& ref_counts() { return pool.pages_.ref_counts_; }
  std::vector<PageId>& free_pages() { return pool.pages_.free_; }
  std::vector<PageId>& pages(SequenceId id) { return pool.Find(id).pages; }
  std::vector<int32_t>& depths(SequenceId id) { return pool.Find(id).depths; }
  int64_t& committed(SequenceId id) { return pool.Find(id).committed; }
  void Release(PageId page) { pool.pages_.Release(page); }
};

}  // namespace layerskip

namespace {

using layerskip::PagePool;
using layerskip::PagePoolPeer;

// Pages of 2 rows, 4 layers. Sequence 0: pages 0, 1; 1 committed row, pending depths 2, 0.
// Sequence 1: page 2; pending depth 0. Free: 3, 4, 5.
void Fill(PagePool& pool) {
  pool.AddSequence();
  pool.AddSequence();
  pool.Append({0}, {1});
  pool.RaiseRows({0}, {1}, 4);
  pool.Commit({0}, {1});
  pool.Append({0, 1}, {2, 1});
  pool.RaiseRows({0}, {2}, 2);
}

struct Case {
  const char* name;
  std::function<void(PagePoolPeer&)> act;
  const char* expected;  // part of the message
};

const Case kCases[] = {
    {"reference count too high", [](PagePoolPeer& p) { p.ref_counts()[1] = 2; },
     "page 1 has reference count 2"},
    {"reference count too low", [](PagePoolPeer& p) { p.ref_counts()[1] = 0; },
     "page 1 has reference count 0"},
    {"reference count without owner", [](PagePoolPeer& p) { p.ref_counts()[4] = 1; }, "page 4 has reference"},
    {"free and owned", [](PagePoolPeer& p) { p.free_pages().push_back(2); }, "page 2 is both free and owned"},
    {"twice free", [](PagePoolPeer& p) { p.free_pages().push_back(3); }, "names page 3 twice"},
    {"free page out of range", [](PagePoolPeer& p) { p.free_pages().push_back(6); }, "page 6 outside 0..5"},
    {"lost page", [](PagePoolPeer& p) { p.free_pages().pop_back(); }, "2 free + 0 cached + 3 owned pages"},
    {"table entry too large", [](PagePoolPeer& p) { p.pages(0)[1] = 6; }, "a page outside 0..5"},
    {"table entry negative", [](PagePoolPeer& p) { p.pages(0)[1] = -1; }, "a page outside 0..5"},
    {"page twice in a table", [](PagePoolPeer& p) { p.pages(0)[1] = 0; }, "names a page twice"},
    {"page of another sequence", [](PagePoolPeer& p) { p.pages(1)[0] = 1; },
     "page 1 has reference count 1 and 2"},
    {"table too short", [](PagePoolPeer& p) { p.pages(0).pop_back(); }, "1 pages for length 3, expected 2"},
    {"table too long", [](PagePoolPeer& p) { p.pages(1).push_back(3); }, "2 pages for length 1, expected 1"},
    {"depth rises", [](PagePoolPeer& p) { p.depths(0)[1] = 3; }, "sequence 0 are no staircase"},
    {"depth too large", [](PagePoolPeer& p) { p.depths(0)[0] = 5; }, "sequence 0 are no staircase"},
    {"depth negative", [](PagePoolPeer& p) { p.depths(1)[0] = -1; }, "sequence 1 are no staircase"},
    {"committed negative", [](PagePoolPeer& p) { p.committed(1) = -1; }, "-1 committed rows"},
    {"free page released", [](PagePoolPeer& p) { p.Release(5); }, "released page 5, which is not owned"},
    {"raise on no staircase",
     [](PagePoolPeer& p) {
       p.depths(0)[1] = 3;
       p.pool.RaiseRows({0}, {2}, 1);
     },
     "raising sequence 0 leaves no staircase"},
};

std::string MessageOf(const std::function<void()>& act) {
  try {
    act();
  } catch (const std::invalid_argument& error) {
    return std::string("wrong kind of error: ") + error.what();
  } catch (const std::logic_error& error) {
    return error.what();
  }
  return "no error";
}

bool Passes(const Case& c) {
  PagePool pool(6, 2, 4);
  Fill(pool);
  pool.CheckIntegrity();
  PagePoolPeer peer{pool};
  const std::string message = MessageOf([&] {
    c.act(peer);
    pool.CheckIntegrity();
  });
  if (message.find(c.expected) != std::string::npos) return true;
  std::printf("%s: expected \"%s\", got \"%s\"\n", c.name, c.expected, message.c_str());
  return false;
}

}  // namespace

int main() {
  int num_failures = 0;
  for (const Case& c : kCases) num_failures += !Passes(c);
  return num_failures;
}
