// The cache ops' bodies, the very lines that nvcc compiles, on memory that ends where the tensors end: built and run by
// tests/ops/test_cuda_cache.py under the address and undefined-behaviour sanitizers. Every op runs as a grid would run
// it, with many lanes per block and the blocks in any order, on good data and on garbage; exits with the number of
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
int32_t StrayPage(int64_t num_pages) {
  const int32_t values[] = {static_cast<int32_t>(num_pages), static_cast<int32_t>(num_pages) + 1, -2, INT32_MAX,
                            INT32_MIN};
  return values[Random(0, 4)];
}

// ---- positions, out of their pages and back ----

struct Sizes {
  int64_t layers, pages, heads, dim, page_size;
  int64_t Width() const { return heads * dim; }
  int64_t CacheSize() const { return layers * pages * Width() * page_size; }
  int64_t KAt(int64_t layer, int64_t page, int64_t offset, int64_t e) const {
    return (((layer * pages + page) * heads + e / dim) * dim + e % dim) * page_size + offset;
  }
  int64_t VAt(int64_t layer, int64_t page, int64_t offset, int64_t e) const {
    return (((layer * pages + page) * heads + e / dim) * page_size + offset) * dim + e % dim;
  }
};

template <bool kOut, class T>
MoveKv<T, kOut> Move(const Sizes& sizes, std::vector<T>& k_cache, std::vector<T>& v_cache,
                     const std::vector<int32_t>& pages, std::vector<T>& k, std::vector<T>& v, int64_t start,
                     int64_t length, int64_t* error) {
  const auto columns = static_cast<int64_t>(pages.size());
  return {k_cache.data(), v_cache.data(), pages.data(), k.data(),    v.data(),  start,           length,
          columns,        sizes.layers,   sizes.pages,  sizes.heads, sizes.dim, sizes.page_size, error};
}

template <class T>
void TestScatterAndGather(int64_t page_size, int64_t lanes) {
  const Sizes sizes{2, 5, 3, 6, page_size};
  const std::vector<T> before = RandomBits<T>(sizes.CacheSize());
  const std::vector<int32_t> table = {3, 0, 4};
  const int64_t length = 3 * page_size - (page_size > 1 ? 1 : 0), width = sizes.Width();
  for (const int64_t start : {int64_t{0}, int64_t{1}, page_size, length - 1, length}) {
    std::vector<T> k_cache = before, v_cache = before, expected_k = before, expected_v = before;
    std::vector<T> k = RandomBits<T>(sizes.layers * length * width), v = RandomBits<T>(k.size());
    for (int64_t l = 0; l < sizes.layers; ++l)
      for (int64_t i = start; i < length; ++i)
        for (int64_t e = 0; e < width; ++e) {
          const int64_t page = table[i / page_size], offset = i % page_size, from = (l * length + i) * width + e;
          expected_k[sizes.KAt(l, page, offset, e)] = k[from];
          expected_v[sizes.VAt(l, page, offset, e)] = v[from];
        }
    int64_t error = 0;
    RunAsGrid(Move<false>(sizes, k_cache, v_cache, table, k, v, start, length, &error), lanes);
    Expect(error == 0 && k_cache == expected_k && v_cache == expected_v, "positions from start on, and nothing else");
    if (start > 0) continue;
    std::vector<T> k_out(k.size()), v_out(v.size());
    RunAsGrid(Move<true>(sizes, k_cache, v_cache, table, k_out, v_out, 0, length, &error), lanes);
    Expect(error == 0 && k_out == k && v_out == v, "gather gives back what scatter wrote");
  }
}

void TestStrayTables() {
  const Sizes sizes{1, 4, 2, 3, 5};
  const std::vector<uint32_t> before = RandomBits<uint32_t>(sizes.CacheSize());
  for (int round = 0; round < 40; ++round) {
    const bool out = round % 2 == 0;
    std::vector<uint32_t> k_cache = before, v_cache = before;
    const std::vector<int32_t> table = {1, StrayPage(sizes.pages), StrayPage(sizes.pages)};
    const int64_t length = 4 * sizes.page_size + 2;  // two columns more than the table has
    const int64_t start = out ? 0 : sizes.page_size;
    std::vector<uint32_t> k = RandomBits<uint32_t>(length * sizes.Width()), v = k;
    int64_t error = 0;
    if (out)
      RunAsGrid(Move<true>(sizes, k_cache, v_cache, table, k, v, start, length, &error), 4);
    else
      RunAsGrid(Move<false>(sizes, k_cache, v_cache, table, k, v, start, length, &error), 4);
    const auto is_zero = [](uint32_t value) { return value == 0; };
    const int64_t first = sizes.page_size * sizes.Width();
    if (out)
      Expect(std::all_of(k.begin() + first, k.end(), is_zero) && std::all_of(v.begin() + first, v.end(), is_zero),
             "what a refused page should have held is zero");
    Expect(k_cache == before && v_cache == before, "stray pages are not written");
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
void TestCopies(int64_t words, int64_t lanes) {
  const int64_t size = sizeof(W);
  TestCache cache(3, 6, words * size, (words + 1) * size);
  const TestCache before = cache;
  const std::vector<int32_t> sources = {0, kSkip, 0, 5}, targets = {2, 3, 4, kSkip};
  int64_t error = 0;
  RunAsGrid(CopyPages<W>{cache.View(), sources.data(), targets.data(), 4, &error}, lanes);
  for (const int64_t page : {0, 1, 3, 5}) Expect(cache.Page(page) == before.Page(page), "untouched by copies");
  for (const int64_t page : {2, 4}) Expect(cache.Page(page) == before.Page(0), "page 0 was copied");
  Expect(error == 0, "nothing was refused");
}

void TestStrayCopies() {
  for (int round = 0; round < 40; ++round) {
    TestCache cache(2, 4, 10, 6);
    const TestCache before = cache;
    const std::vector<int32_t> pages = {kSkip, StrayPage(4), StrayPage(4)}, targets = {1, 2, StrayPage(4)};
    const bool swapped = round % 2 == 1;  // stray targets, too
    int64_t error = 0;
    RunAsGrid(CopyPages<Word<2>>{cache.View(), (swapped ? targets : pages).data(), (swapped ? pages : targets).data(),
                                 3, &error},
              3);
    Expect(cache.k == before.k && cache.v == before.v && cache.hidden == before.hidden, "stray copies write nothing");
    ExpectError(error, Refusal::kPage, 1, "the first stray copy is noted");
  }
}

void TestOverlaps() {
  struct Case {
    std::vector<int32_t> sources, targets;
    int64_t first;
  };
  const Case cases[] = {
      {{0, 1, 2}, {3, 4, 4}, 1},  // two writers
      {{0, 1, 3}, {5, 2, 1}, 1},  // read by one, written by the other
      {{0, 1, 5}, {2, 3, 5}, 2},  // itself
  };
  for (const Case& c : cases) {
    TestCache cache(1, 6, 4, 2);
    int64_t error = 0;
    RunAsGrid(CopyPages<Word<2>>{cache.View(), c.sources.data(), c.targets.data(), 3, &error}, 2);
    ExpectError(error, Refusal::kOverlap, c.first, "clashing copies are refused");
  }
}

}  // namespace

int main() {
  for (const int64_t page_size : {1, 7, 16})
    for (const int64_t lanes : {1, 5, 64}) {
      TestScatterAndGather<uint16_t>(page_size, lanes);
      TestScatterAndGather<uint32_t>(page_size, lanes);
    }
  TestStrayTables();
  for (const int64_t words : {1, 3, 4, 9, 40})
    for (const int64_t lanes : {1, 2, 32}) {
      TestCopies<Word<2>>(words, lanes);
      TestCopies<Word<16>>(words, lanes);
    }
  TestStrayCopies();
  TestOverlaps();
  return std::min(num_failures, 100);
}
