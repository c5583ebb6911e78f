// The cache ops' bodies, the very lines that nvcc compiles, on memory that ends where the tensors end: built and run by
// tests/test_cuda_cache.py under the address and undefined-behaviour sanitizers. Every op runs as a grid would run it,
// with many lanes per block and the blocks in any order, on good data and on garbage; exits with the number of
// failures.
#include <algorithm>
#include <climits>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/include/page_ops.h"

namespace {

using namespace layerskip;

int num_failures = 0;

void Expect(bool holds, const std::string& what) {
  if (holds) return;
  ++num_failures;
  std::printf("failed: %s\n", what.c_str());
}

std::mt19937_64 generator(20240501);

int64_t Random(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

// Exactly as large as it must be, so that the sanitizer sees one element too many.
template <class T>
std::vector<T> RandomBits(int64_t count) {
  std::vector<T> values(count);
  for (T& value : values) value = static_cast<T>(generator());
  values.shrink_to_fit();
  return values;
}

// As on a device: all lanes of all blocks, the blocks in random order.
template <class Op>
void RunAsGrid(const Op& op, int64_t lanes) {
  std::vector<int64_t> blocks(op.NumBlocks());
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), generator);
  for (const int64_t block : blocks)
    for (int64_t lane = 0; lane < lanes; ++lane) op(block, lane, lanes);
}

Refusal KindOf(int64_t error) { return static_cast<Refusal>(error >> kRefusalShift); }
int64_t IndexOf(int64_t error) { return kMaxRefusedIndex - (error & kMaxRefusedIndex); }

void ExpectError(int64_t error, Refusal kind, int64_t index, const std::string& what) {
  Expect(error != 0 && KindOf(error) == kind && IndexOf(error) == index, what);
}

// What stray data looks like: near the limits, far beyond, and what overflows when multiplied.
int64_t Stray(int64_t limit) {
  const int64_t values[] = {limit, limit + 1, -2, -limit, INT32_MAX, INT32_MIN, INT64_MAX, INT64_MIN, INT64_MAX / 2};
  return values[Random(0, 8)];
}

int32_t StrayPage(int64_t num_pages) {
  const int32_t values[] = {static_cast<int32_t>(num_pages), static_cast<int32_t>(num_pages) + 1, -2, INT32_MAX,
                            INT32_MIN};
  return values[Random(0, 4)];
}

// ---- append and gather: what was appended is gathered ----

template <class T>
void TestAppendAndGather(int64_t page_size, int64_t lanes) {
  const int64_t pages = 5, heads = 3, dim = 6, layers = 2, width = heads * dim, plane = pages * width * page_size;
  std::vector<T> k_cache = RandomBits<T>(layers * plane), v_cache = RandomBits<T>(layers * plane);
  const std::vector<int32_t> table = {3, 0, 4};
  const int64_t length = 3 * page_size - (page_size > 1 ? 1 : 0);
  std::vector<int64_t> slots(length);
  for (int64_t i = 0; i < length; ++i) slots[i] = table[i / page_size] * page_size + i % page_size;
  std::vector<T> k = RandomBits<T>(layers * length * width), v = RandomBits<T>(layers * length * width);
  int64_t error = 0;
  for (int64_t l = 0; l < layers; ++l) {
    const AppendKv<T> append{&k[l * length * width],
                             &v[l * length * width],
                             slots.data(),
                             &k_cache[l * plane],
                             &v_cache[l * plane],
                             length,
                             pages,
                             heads,
                             dim,
                             page_size,
                             &error};
    RunAsGrid(append, lanes);
  }
  std::vector<T> k_out(k.size()), v_out(v.size());
  const GatherKv<T> gather{k_cache.data(), v_cache.data(), table.data(), k_out.data(), v_out.data(), length, 3,
                           layers,         pages,          heads,        dim,          page_size,    &error};
  RunAsGrid(gather, lanes);
  Expect(error == 0 && k_out == k && v_out == v, "gather gives back what append wrote");

  const AppendKv<T> one{&k[0], &v[0], &slots[1], k_cache.data(), v_cache.data(), 1,
                        pages, heads, dim,       page_size,      &error};
  RunAsGrid(one, lanes);
  const int64_t page = slots[1] / page_size, offset = slots[1] % page_size;
  for (int64_t e = 0; e < width; ++e) {
    const int64_t head = page * heads + e / dim, d = e % dim;
    Expect(k_cache[(head * dim + d) * page_size + offset] == k[e], "k lies transposed");
    Expect(v_cache[(head * page_size + offset) * dim + d] == v[e], "v lies in rows");
  }
}

void TestStraySlots() {
  const int64_t pages = 4, heads = 2, dim = 3, page_size = 5, rows = 40, width = heads * dim;
  const std::vector<uint16_t> k = RandomBits<uint16_t>(rows * width), v = RandomBits<uint16_t>(rows * width);
  const std::vector<uint16_t> before = RandomBits<uint16_t>(pages * width * page_size);
  std::vector<uint16_t> k_pages = before, v_pages = before;
  std::vector<int64_t> slots(rows);
  for (int64_t& slot : slots) slot = Stray(pages * page_size);
  slots[0] = slots[1] = kSkip;
  int64_t error = 0;
  RunAsGrid(AppendKv<uint16_t>{k.data(), v.data(), slots.data(), k_pages.data(), v_pages.data(), rows, pages, heads,
                               dim, page_size, &error},
            7);
  Expect(k_pages == before && v_pages == before, "stray slots write nothing");
  ExpectError(error, Refusal::kSlot, 2, "the first stray slot is noted");
}

void TestStrayTables() {
  const int64_t pages = 4, heads = 2, dim = 3, page_size = 5, columns = 3;
  const std::vector<uint32_t> cache = RandomBits<uint32_t>(pages * heads * dim * page_size);
  for (int round = 0; round < 20; ++round) {
    std::vector<int32_t> table = {1, StrayPage(pages), StrayPage(pages)};
    const int64_t length = 4 * page_size + 2;  // two columns more than the table has
    std::vector<uint32_t> k = RandomBits<uint32_t>(length * heads * dim), v = k;
    int64_t error = 0;
    RunAsGrid(GatherKv<uint32_t>{cache.data(), cache.data(), table.data(), k.data(), v.data(), length, columns, 1,
                                 pages, heads, dim, page_size, &error},
              4);
    const auto is_zero = [](uint32_t value) { return value == 0; };
    const int64_t first = page_size * heads * dim;
    Expect(std::all_of(k.begin() + first, k.end(), is_zero) && std::all_of(v.begin() + first, v.end(), is_zero),
           "what a refused page should have held is zero");
    ExpectError(error, Refusal::kPage, 1, "the first stray page is noted");
  }
}

// ---- whole pages ----

struct TestCache {
  int64_t layers, pages, kv_bytes, hidden_bytes;
  std::vector<char> k, v, hidden;

  TestCache(int64_t layers, int64_t pages, int64_t kv_bytes, int64_t hidden_bytes)
      : layers(layers),
        pages(pages),
        kv_bytes(kv_bytes),
        hidden_bytes(hidden_bytes),
        k(RandomBits<char>(layers * pages * kv_bytes)),
        v(RandomBits<char>(layers * pages * kv_bytes)),
        hidden(RandomBits<char>(pages * hidden_bytes)) {}

  CacheView View() { return {k.data(), v.data(), hidden.data(), layers, pages, kv_bytes, hidden_bytes}; }

  // A page's bytes, gathered without the code under test.
  std::vector<char> Page(int64_t page) const {
    std::vector<char> bytes;
    for (const std::vector<char>* cache : {&k, &v})
      for (int64_t l = 0; l < layers; ++l) {
        const auto start = cache->begin() + (l * pages + page) * kv_bytes;
        bytes.insert(bytes.end(), start, start + kv_bytes);
      }
    bytes.insert(bytes.end(), hidden.begin() + page * hidden_bytes, hidden.begin() + (page + 1) * hidden_bytes);
    return bytes;
  }
};

template <class W>
void TestMoves(int64_t words, int64_t lanes) {
  const int64_t size = sizeof(W);
  TestCache cache(3, 6, words * size, (words + 1) * size);
  const TestCache before = cache;
  const std::vector<int32_t> sources = {0, kSkip, 0, 5}, targets = {2, 3, 4, kSkip};
  int64_t error = 0;
  RunAsGrid(MovePages<W>{cache.View(), sources.data(), targets.data(), nullptr, Direction::kPageToPage, 4, &error},
            lanes);
  for (const int64_t page : {0, 1, 3, 5}) Expect(cache.Page(page) == before.Page(page), "untouched by copies");
  for (const int64_t page : {2, 4}) Expect(cache.Page(page) == before.Page(0), "page 0 was copied");

  const std::vector<int32_t> out = {5, 1}, in = {3, 2};
  std::vector<char> records(2 * cache.View().RecordBytes());
  RunAsGrid(MovePages<W>{cache.View(), out.data(), nullptr, records.data(), Direction::kPageToRecord, 2, &error},
            lanes);
  std::vector<char> expected = before.Page(5);
  const std::vector<char> second = before.Page(1);
  expected.insert(expected.end(), second.begin(), second.end());
  Expect(records == expected, "records are pages, one after the other");
  RunAsGrid(MovePages<W>{cache.View(), in.data(), nullptr, records.data(), Direction::kRecordToPage, 2, &error}, lanes);
  Expect(cache.Page(3) == before.Page(5) && cache.Page(2) == before.Page(1), "records come back elsewhere");
  Expect(cache.Page(4) == before.Page(0) && cache.Page(5) == before.Page(5), "untouched by swaps");
  Expect(error == 0, "nothing was refused");
}

void TestStrayMoves() {
  for (const Direction direction : {Direction::kPageToPage, Direction::kPageToRecord, Direction::kRecordToPage})
    for (int round = 0; round < 20; ++round) {
      TestCache cache(2, 4, 10, 6);
      const TestCache before = cache;
      const std::vector<int32_t> pages = {kSkip, StrayPage(4), StrayPage(4)}, targets = {1, 2, StrayPage(4)};
      std::vector<char> records(3 * cache.View().RecordBytes(), 'x');
      int64_t error = 0;
      RunAsGrid(MovePages<Word<2>>{cache.View(), pages.data(), targets.data(), records.data(), direction, 3, &error},
                3);
      Expect(cache.k == before.k && cache.v == before.v && cache.hidden == before.hidden, "stray moves write nothing");
      Expect(std::all_of(records.begin(), records.end(), [](char c) { return c == 'x'; }), "nor to records");
      ExpectError(error, Refusal::kPage, 1, "the first stray move is noted");
    }
}

void TestOverlaps() {
  struct Case {
    std::vector<int32_t> pages, targets;
    int64_t first;
    Direction direction;
  };
  const Case cases[] = {
      {{0, 1, 2}, {3, 4, 4}, 1, Direction::kPageToPage},     // two writers
      {{0, 1, 3}, {5, 2, 1}, 1, Direction::kPageToPage},     // read by one, written by the other
      {{0, 1, 5}, {2, 3, 5}, 2, Direction::kPageToPage},     // itself
      {{0, 3, 3}, {}, 1, Direction::kRecordToPage},          // two writers
      {{0, 3, 3}, {}, INT64_MAX, Direction::kPageToRecord},  // two readers are no clash
  };
  for (const Case& c : cases) {
    TestCache cache(1, 6, 4, 2);
    std::vector<char> records(3 * cache.View().RecordBytes());
    int64_t error = 0;
    RunAsGrid(
        MovePages<Word<2>>{cache.View(), c.pages.data(), c.targets.data(), records.data(), c.direction, 3, &error}, 2);
    if (c.first == INT64_MAX)
      Expect(error == 0, "two readers are no clash");
    else
      ExpectError(error, Refusal::kOverlap, c.first, "clashing moves are refused");
  }
}

// ---- slots and lengths ----

void TestSlots() {
  const int64_t sequences = 3, columns = 2, pages = 9, page_size = 4, rows = 700;
  std::vector<int32_t> table = {1, 8, 3, 0, 5, 2};
  const std::vector<int32_t> starts = {0, 300, 300, 700};
  std::vector<int64_t> positions(rows), slots(rows, 77);
  for (int64_t& position : positions) position = Random(-1, columns * page_size - 1);
  int64_t error = 0;
  const MakeSlotMapping op{table.data(), positions.data(), starts.data(), slots.data(), rows,
                           sequences,    columns,          pages,         page_size,    &error};
  RunAsGrid(op, 32);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t position = positions[row], sequence = row < 300 ? 0 : 2;
    const int64_t page = position < 0 ? 0 : table[sequence * columns + position / page_size];
    Expect(slots[row] == (position < 0 ? kSkip : page * page_size + position % page_size), "a row's slot");
  }
  Expect(error == 0, "no row was refused");
  for (int64_t row = 0; row < rows; ++row) positions[row] = row == 0 ? kSkip : Stray(columns * page_size);
  RunAsGrid(op, 5);
  Expect(std::all_of(slots.begin(), slots.end(), [](int64_t slot) { return slot == kSkip; }), "stray rows: no slot");
  ExpectError(error, Refusal::kColumn, 1, "the first stray row is noted");
  for (int64_t& position : positions) position = 3;
  for (int32_t& page : table) page = StrayPage(pages);
  table[0] = pages;
  error = 0;
  RunAsGrid(op, 5);
  Expect(std::all_of(slots.begin(), slots.end(), [](int64_t slot) { return slot == kSkip; }), "stray pages: no slot");
  ExpectError(error, Refusal::kPage, 0, "the first stray page is noted");
}

void TestStrayStarts() {
  const std::vector<int32_t> table = {1, 2};
  const std::vector<int64_t> positions(300, 0);
  for (int round = 0; round < 200; ++round) {
    std::vector<int32_t> starts(3);
    for (int32_t& start : starts) start = static_cast<int32_t>(Stray(300));
    std::vector<int64_t> slots(300);
    int64_t error = 0;
    RunAsGrid(MakeSlotMapping{table.data(), positions.data(), starts.data(), slots.data(), 300, 2, 1, 4, 4, &error}, 3);
    for (const int64_t slot : slots)
      Expect(slot == kSkip || slot == 4 || slot == 8, "garbage starts stay in the table");
  }
}

void TestLengths() {
  int64_t length = 10, error_of_one = 0;
  const int64_t drafted = 3, one_more = 4;
  RunAsGrid(CommitLengths{&one_more, &drafted, &length, 1, 50, &error_of_one}, 1);
  Expect(length == 10, "no more are accepted than were drafted");
  ExpectError(error_of_one, Refusal::kCount, 0, "one more than was drafted is noted");

  for (int round = 0; round < 500; ++round) {
    const int64_t count = Random(1, 600), max_length = 50;
    std::vector<int64_t> accepted(count), drafts(count), lengths(count), expected;
    int64_t first_bad = -1;
    for (int64_t b = 0; b < count; ++b) {
      drafts[b] = Random(0, 8);
      accepted[b] = Random(0, 9) == 0 ? kSkip : Random(0, drafts[b]);
      lengths[b] = Random(0, max_length - accepted[b] - 1);
      const bool bad = Random(0, 20) == 0;
      if (bad) (Random(0, 1) == 0 ? accepted[b] : lengths[b]) = Stray(max_length);
      if (bad && accepted[b] != kSkip && first_bad < 0) first_bad = b;
      expected.push_back(bad || accepted[b] == kSkip ? lengths[b] : lengths[b] + accepted[b] + 1);
    }
    int64_t error = 0;
    RunAsGrid(CommitLengths{accepted.data(), drafts.data(), lengths.data(), count, max_length, &error}, 9);
    Expect(lengths == expected, "lengths grow by what was accepted and one");
    if (first_bad < 0)
      Expect(error == 0, "no length was refused");
    else
      ExpectError(error, Refusal::kCount, first_bad, "the first stray length is noted");
  }
}

}  // namespace

int main() {
  for (const int64_t page_size : {1, 7, 16})
    for (const int64_t lanes : {1, 5, 64}) {
      TestAppendAndGather<uint16_t>(page_size, lanes);
      TestAppendAndGather<uint32_t>(page_size, lanes);
    }
  TestStraySlots();
  TestStrayTables();
  for (const int64_t words : {1, 3, 4, 9, 40})
    for (const int64_t lanes : {1, 2, 32}) {
      TestMoves<Word<2>>(words, lanes);
      TestMoves<Word<16>>(words, lanes);
    }
  TestStrayMoves();
  TestOverlaps();
  TestSlots();
  TestStrayStarts();
  TestLengths();
  return std::min(num_failures, 100);
}
