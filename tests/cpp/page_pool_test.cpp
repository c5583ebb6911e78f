// What Python cannot reach: CheckIntegrity sees each kind of damage, a page that is not owned cannot be released, and
// a name that collides is no hit.
#include "check.h"

namespace layerskip {
namespace {

// Pages of 2 rows, 4 layers. Sequence 0: pages 0, 1; 1 committed row, pending depths 2, 0.
// Sequence 1: page 2; pending depth 0. Sequence 2: page 3, which is published, as are the cached pages 5, 4 (the
// last of a chain is the first to go). Free: 6, 7.
void FillPool(PagePool& pool) {
  for (int i = 0; i < 4; ++i) pool.AddSequence();
  pool.Append({0}, {1});
  pool.RaiseRows({0}, {1}, 4);
  pool.Commit({0}, {1});
  pool.Append({0, 1}, {2, 1});
  pool.RaiseRows({0}, {2}, 2);
  Fill(pool, 2, {7, 8});
  Fill(pool, 3, {1, 2, 3, 4});
  pool.FreeSequence(3);
}

PoolOptions Sharing() { return {"model", {}}; }

struct Case {
  const char* name;
  std::function<void(PagePoolPeer&)> act;
  const char* expected;  // part of the message
};

const Case kCases[] = {
    {"reference count too high", [](PagePoolPeer& p) { p.ref_counts()[1] = 2; }, "page 1 has reference count 2"},
    {"reference count too low", [](PagePoolPeer& p) { p.ref_counts()[1] = 0; }, "page 1 has reference count 0"},
    {"reference count without owner", [](PagePoolPeer& p) { p.ref_counts()[6] = 1; }, "page 6 has reference"},
    {"free and owned", [](PagePoolPeer& p) { p.free_pages().push_back(2); }, "page 2 is both free and owned"},
    {"twice free", [](PagePoolPeer& p) { p.free_pages().push_back(6); }, "names page 6 twice"},
    {"free page out of range", [](PagePoolPeer& p) { p.free_pages().push_back(8); }, "page 8 outside 0..7"},
    {"free page with a name", [](PagePoolPeer& p) { p.free_pages().push_back(4); }, "page 4 is free and has a name"},
    {"lost page", [](PagePoolPeer& p) { p.free_pages().pop_back(); }, "1 free + 2 cached + 4 owned pages"},
    {"table entry too large", [](PagePoolPeer& p) { p.pages(0)[1] = 8; }, "a page outside 0..7"},
    {"table entry negative", [](PagePoolPeer& p) { p.pages(0)[1] = -1; }, "a page outside 0..7"},
    {"page twice in a table", [](PagePoolPeer& p) { p.pages(0)[1] = 0; }, "names a page twice"},
    {"page of another sequence", [](PagePoolPeer& p) { p.pages(1)[0] = 1; }, "page 1 has reference count 1 and 2"},
    {"pending rows in a shared page",
     [](PagePoolPeer& p) {
       p.pages(1)[0] = 1;
       p.ref_counts()[1] = 2;
       p.ref_counts()[2] = 0;
       p.free_pages().push_back(2);
     },
     "page 1 is shared or has a name"},
    {"pending rows in a page with a name",
     [](PagePoolPeer& p) {
       const int32_t tokens[] = {5, 6};
       p.index().Insert(2, PageName({}, tokens, 2), {}, tokens);
     },
     "page 2 is shared or has a name"},
    {"table too short", [](PagePoolPeer& p) { p.pages(0).pop_back(); }, "1 pages for length 3, expected 2"},
    {"table too long", [](PagePoolPeer& p) { p.pages(1).push_back(6); }, "2 pages for length 1, expected 1"},
    {"depth rises", [](PagePoolPeer& p) { p.depths(0)[1] = 3; }, "sequence 0 are no staircase"},
    {"depth too large", [](PagePoolPeer& p) { p.depths(0)[0] = 5; }, "sequence 0 are no staircase"},
    {"depth negative", [](PagePoolPeer& p) { p.depths(1)[0] = -1; }, "sequence 1 are no staircase"},
    {"committed negative", [](PagePoolPeer& p) { p.committed(1) = -1; }, "-1 committed rows"},
    {"cached and owned", [](PagePoolPeer& p) { p.next(4) = 3; }, "page 3 is both cached and owned"},
    {"cached and free", [](PagePoolPeer& p) { p.next(4) = 7; }, "page 7 is cached twice, or free as well"},
    {"cached in a circle", [](PagePoolPeer& p) { p.next(4) = 5; }, "page 5 is cached twice"},
    {"cached page out of range", [](PagePoolPeer& p) { p.next(4) = 9; }, "page 9 outside 0..7"},
    {"cached page not linked back", [](PagePoolPeer& p) { p.previous(4) = 4; }, "page 4 is linked wrongly"},
    {"cached page without a name", [](PagePoolPeer& p) { p.index().Erase(4); }, "page 4 is cached and has no name"},
    {"cached pages miscounted", [](PagePoolPeer& p) { p.num_cached() = 1; }, "has 2 pages, expected 1"},
    {"tokens of another name", [](PagePoolPeer& p) { p.token(5, 1) = 9; }, "page 5 has not the name of its tokens"},
    {"another parent", [](PagePoolPeer& p) { p.parent(5)[0] ^= 1; }, "page 5 has not the name of its tokens"},
    {"another name", [](PagePoolPeer& p) { p.name(5)[31] ^= 1; }, "page 5 has not the name of its tokens"},
    {"name in another bucket", [](PagePoolPeer& p) { p.name(5)[0] ^= 1; }, "page 5 is not found by its name"},
    {"published another name", [](PagePoolPeer& p) { p.names(2)[0][0] ^= 1; }, "page 3 has another name"},
    {"published too much", [](PagePoolPeer& p) { p.names(0).resize(1); }, "sequence 0 published 1 pages with 1"},
    {"free page released", [](PagePoolPeer& p) { p.list().Release(7); }, "released page 7, which is not owned"},
    {"cached page released", [](PagePoolPeer& p) { p.list().Release(4); }, "released page 4, which is not owned"},
    {"named twice",
     [](PagePoolPeer& p) {
       const int32_t tokens[] = {5, 6};
       p.index().Insert(3, PageName({}, tokens, 2), {}, tokens);
     },
     "page 3 is named twice"},
    {"raise on no staircase",
     [](PagePoolPeer& p) {
       p.depths(0)[1] = 3;
       p.pool.RaiseRows({0}, {2}, 1);
     },
     "raising sequence 0 leaves no staircase"},
};

void TestDamage(const Case& c) {
  PagePool pool(8, 2, 4, Sharing());
  FillPool(pool);
  pool.CheckIntegrity();
  PagePoolPeer peer{pool};
  const std::string message = MessageOf<std::logic_error>([&] {
    c.act(peer);
    pool.CheckIntegrity();
  });
  if (message.rfind("page pool broken: ", 0) == 0 && message.find(c.expected) != std::string::npos) return;
  Fail(Concat(c.name, ": expected \"", c.expected, "\", got \"", message, "\""));
}

// As if two texts had one SHA-256: the ids, and the name before, tell them apart.
void TestCollision() {
  for (const bool same_tokens : {true, false}) {
    PagePool pool(8, 2, 4, Sharing());
    FillPool(pool);
    PagePoolPeer peer{pool};
    ExpectEqual("hit", pool.Committed(pool.AddSequence({1, 2, 3, 4, 5})), 4);
    if (same_tokens) {
      peer.parent(5)[9] ^= 1;
    } else {
      peer.token(5, 0) = 9;
    }
    ExpectEqual("hit of a collision", pool.Committed(pool.AddSequence({1, 2, 3, 4, 5})), 2);
  }
}

}  // namespace
}  // namespace layerskip

int main() {
  for (const auto& c : layerskip::kCases) layerskip::TestDamage(c);
  layerskip::TestCollision();
  return layerskip::num_failures;
}
