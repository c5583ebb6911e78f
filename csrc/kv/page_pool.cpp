#include "page_pool.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>
#include <sstream>
#include <string>
#include <utility>

namespace layerskip {
namespace {

// Kernels take seq_lens, query_start_loc and page ids as int32.
constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxInt64 = std::numeric_limits<int64_t>::max();

template <typename... Parts>
std::string Concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// The caller's mistake.
template <typename... Parts>
void Require(bool ok, const Parts&... parts) {
  if (!ok) throw std::invalid_argument(Concat(parts...));
}

// Our own mistake.
template <typename... Parts>
void Ensure(bool ok, const Parts&... parts) {
  if (!ok) throw std::logic_error(Concat("page pool broken: ", parts...));
}

void RequireSize(const char* name, int64_t value) {
  Require(value >= 1 && value <= kMaxInt32, name, " must be in 1..", kMaxInt32, ", got ", value);
}

void RequireDistinct(std::vector<SequenceId> seqs) {
  std::sort(seqs.begin(), seqs.end());
  const auto twice = std::adjacent_find(seqs.begin(), seqs.end());
  Require(twice == seqs.end(), "seqs must be distinct, sequence ", twice == seqs.end() ? 0 : *twice,
          " comes more than once");
}

bool IsStaircase(const std::vector<int32_t>& depths, int64_t num_layers) {
  if (depths.empty()) return true;
  return depths.front() <= num_layers && depths.back() >= 0 &&
         std::is_sorted(depths.begin(), depths.end(), std::greater<>());
}

std::vector<int32_t> Raised(std::vector<int32_t> depths, int64_t num_rows, int64_t depth) {
  const auto raise = [depth](int32_t old) { return std::max(old, static_cast<int32_t>(depth)); };
  std::transform(depths.begin(), depths.begin() + num_rows, depths.begin(), raise);
  return depths;
}

}  // namespace

CacheFull::CacheFull(int64_t needed, int64_t free)
    : std::runtime_error(Concat("the cache is full: ", needed, " pages needed, ", free,
                                " free; free or truncate sequences, or build the cache with more pages")),
      needed(needed),
      free(free) {}

PagePool::PagePool(int64_t num_pages, int64_t page_size, int64_t num_layers)
    : page_size_(page_size), num_layers_(num_layers) {
  RequireSize("num_pages", num_pages);
  RequireSize("page_size", page_size);
  RequireSize("num_layers", num_layers);
  Require(num_pages * page_size <= kMaxInt32, "num_pages * page_size must be at most ", kMaxInt32, ", got ", num_pages,
          " * ", page_size);
  ref_counts_.assign(num_pages, 0);
  free_pages_.resize(num_pages);
  std::iota(free_pages_.rbegin(), free_pages_.rend(), 0);  // the top of the stack is page 0
}

SequenceId PagePool::AddSequence() {
  sequences_.emplace(next_id_, Sequence());
  return next_id_++;
}

void PagePool::FreeSequence(SequenceId id) {
  Truncate(id, 0);
  sequences_.erase(id);
}

void PagePool::Append(const std::vector<SequenceId>& seqs, const std::vector<int64_t>& counts) {
  const std::vector<Sequence*> batch = FindBatch(seqs, counts, "counts");
  int64_t needed = 0;
  for (size_t i = 0; i < batch.size(); ++i) {
    Require(counts[i] >= 0, "counts[", i, "] must be at least 0, got ", counts[i]);
    needed += std::min(NumNewPages(*batch[i], counts[i]), kMaxInt64 - needed);
  }
  RequirePages(needed);

  for (size_t i = 0; i < batch.size(); ++i) {
    TakePages(*batch[i], NumNewPages(*batch[i], counts[i]));
    batch[i]->depths.insert(batch[i]->depths.end(), counts[i], 0);
  }
}

void PagePool::RaiseRows(const std::vector<SequenceId>& seqs, const std::vector<int64_t>& stops, int64_t depth) {
  const std::vector<Sequence*> batch = FindBatch(seqs, stops, "stops");
  Require(depth >= 1 && depth <= num_layers_, "depth must be in 1..", num_layers_, " (num_layers), got ", depth);
  std::vector<std::vector<int32_t>> raised;
  raised.reserve(batch.size());
  for (size_t i = 0; i < batch.size(); ++i) {
    const Sequence& seq = *batch[i];
    Require(seq.committed <= stops[i] && stops[i] <= seq.length(), "stops[", i, "] must be in ", seq.committed, "..",
            seq.length(), " (committed..length of sequence ", seqs[i], "), got ", stops[i]);
    raised.push_back(Raised(seq.depths, stops[i] - seq.committed, depth));
    // Raising from the front keeps a staircase, so only a state that was none already can fail here.
    Ensure(IsStaircase(raised[i], num_layers_), "raising sequence ", seqs[i], " leaves no staircase");
  }

  for (size_t i = 0; i < batch.size(); ++i) batch[i]->depths = std::move(raised[i]);
}

void PagePool::Commit(const std::vector<SequenceId>& seqs, const std::vector<int64_t>& lengths) {
  const std::vector<Sequence*> batch = FindBatch(seqs, lengths, "lengths");
  for (size_t i = 0; i < batch.size(); ++i) {
    const Sequence& seq = *batch[i];
    Require(seq.committed <= lengths[i] && lengths[i] <= seq.length(), "lengths[", i, "] must be in ", seq.committed,
            "..", seq.length(), " (committed..length of sequence ", seqs[i], "), got ", lengths[i]);
    // The last row is the shallowest of a staircase.
    const int64_t shallowest = lengths[i] == seq.committed ? num_layers_ : seq.depths[lengths[i] - seq.committed - 1];
    Require(shallowest == num_layers_, "lengths[", i, "] = ", lengths[i], " commits a row of sequence ", seqs[i],
            " at depth ", shallowest, "; a committed row has passed all ", num_layers_, " layers");
  }

  for (size_t i = 0; i < batch.size(); ++i) {
    batch[i]->committed = lengths[i];
    batch[i]->depths.clear();
    GiveBackUnused(*batch[i]);
  }
}

void PagePool::Truncate(SequenceId id, int64_t new_length) {
  Sequence& seq = Find(id);
  Require(0 <= new_length && new_length <= seq.length(), "new_length must be in 0..", seq.length(),
          " (length of sequence ", id, "), got ", new_length);

  seq.committed = std::min(seq.committed, new_length);
  seq.depths.resize(new_length - seq.committed);
  GiveBackUnused(seq);
}

void PagePool::Rollback(SequenceId id) { Truncate(id, Committed(id)); }

int64_t PagePool::RefCount(int64_t page) const {
  Require(0 <= page && page < num_pages(), "page must be in 0..", num_pages() - 1, ", got ", page);
  return ref_counts_[page];
}

std::vector<int64_t> PagePool::Lengths(const std::vector<SequenceId>& seqs) const {
  std::vector<int64_t> lengths;
  lengths.reserve(seqs.size());
  for (const SequenceId id : seqs) lengths.push_back(Length(id));
  return lengths;
}

std::vector<int64_t> PagePool::CommittedLengths(const std::vector<SequenceId>& seqs) const {
  std::vector<int64_t> lengths;
  lengths.reserve(seqs.size());
  for (const SequenceId id : seqs) lengths.push_back(Committed(id));
  return lengths;
}

BlockTable PagePool::MakeBlockTable(const std::vector<SequenceId>& seqs) const {
  size_t columns = 1;  // a kernel never sees an empty table
  for (const SequenceId id : seqs) columns = std::max(columns, Pages(id).size());

  std::vector<PageId> entries(seqs.size() * columns, kNoPage);
  for (size_t i = 0; i < seqs.size(); ++i) {
    const std::vector<PageId>& pages = Pages(seqs[i]);
    std::copy(pages.begin(), pages.end(), entries.begin() + i * columns);
  }
  return {static_cast<int64_t>(seqs.size()), static_cast<int64_t>(columns), std::move(entries)};
}

PendingDepths PagePool::MakePendingDepths(const std::vector<SequenceId>& seqs) const {
  PendingDepths pending{{}, {0}};
  for (const SequenceId id : seqs) {
    const std::vector<int32_t>& depths = Depths(id);
    pending.depths.insert(pending.depths.end(), depths.begin(), depths.end());
    pending.starts.push_back(static_cast<int32_t>(pending.depths.size()));
  }
  return pending;
}

const PagePool::Sequence& PagePool::Find(SequenceId id) const {
  const auto found = sequences_.find(id);
  Require(found != sequences_.end(), "sequence ", id, " is not in the pool: never added, or freed already");
  return found->second;
}

PagePool::Sequence& PagePool::Find(SequenceId id) { return const_cast<Sequence&>(std::as_const(*this).Find(id)); }

std::vector<PagePool::Sequence*> PagePool::FindBatch(const std::vector<SequenceId>& seqs,
                                                     const std::vector<int64_t>& values, const char* values_name) {
  Require(values.size() == seqs.size(), values_name, " must have one value per sequence, got ", values.size(), " for ",
          seqs.size(), " seqs");
  RequireDistinct(seqs);
  std::vector<Sequence*> batch;
  batch.reserve(seqs.size());
  for (const SequenceId id : seqs) batch.push_back(&Find(id));
  return batch;
}

int64_t PagePool::NumPagesFor(int64_t length) const { return length / page_size_ + (length % page_size_ != 0); }

int64_t PagePool::NumNewPages(const Sequence& seq, int64_t count) const {
  // By the room left in the last page, because length + count may overflow.
  const int64_t room = static_cast<int64_t>(seq.pages.size()) * page_size_ - seq.length();
  return NumPagesFor(std::max<int64_t>(count - room, 0));
}

void PagePool::RequirePages(int64_t needed) const {
  if (needed > num_free()) throw CacheFull(needed, num_free());
}

void PagePool::TakePages(Sequence& seq, int64_t count) {
  RequirePages(count);
  for (int64_t i = 0; i < count; ++i) {
    const PageId page = free_pages_.back();
    seq.pages.push_back(page);
    free_pages_.pop_back();
    Retain(page);
  }
}

void PagePool::GiveBackUnused(Sequence& seq) {
  const size_t used = NumPagesFor(seq.length());
  // From the back, so that the next pages taken are the same ones in the same order.
  while (seq.pages.size() > used) {
    Release(seq.pages.back());
    seq.pages.pop_back();
  }
}

void PagePool::Retain(PageId page) { ++ref_counts_[page]; }

void PagePool::Release(PageId page) {
  Ensure(ref_counts_[page] > 0, "released page ", page, ", which is free");
  if (--ref_counts_[page] == 0) free_pages_.push_back(page);
}

void PagePool::CheckIntegrity() const {
  std::vector<int32_t> num_entries(num_pages(), 0);
  for (const auto& [id, seq] : sequences_) {
    CheckSequence(id, seq);
    for (const PageId page : seq.pages) ++num_entries[page];
  }
  CheckPages(num_entries);
}

void PagePool::CheckSequence(SequenceId id, const Sequence& seq) const {
  Ensure(seq.committed >= 0, "sequence ", id, " has ", seq.committed, " committed rows");
  Ensure(IsStaircase(seq.depths, num_layers_), "the pending rows of sequence ", id, " are no staircase");
  Ensure(static_cast<int64_t>(seq.pages.size()) == NumPagesFor(seq.length()), "sequence ", id, " has ",
         seq.pages.size(), " pages for length ", seq.length(), ", expected ", NumPagesFor(seq.length()));
  std::vector<PageId> pages = seq.pages;
  std::sort(pages.begin(), pages.end());
  Ensure(pages.empty() || (pages.front() >= 0 && pages.back() < num_pages()), "the table of sequence ", id,
         " names a page outside 0..", num_pages() - 1);
  Ensure(std::adjacent_find(pages.begin(), pages.end()) == pages.end(), "the table of sequence ", id,
         " names a page twice");
}

void PagePool::CheckPages(const std::vector<int32_t>& num_entries) const {
  std::vector<bool> is_free(num_pages(), false);
  for (const PageId page : free_pages_) {
    Ensure(0 <= page && page < num_pages(), "the free list names page ", page, " outside 0..", num_pages() - 1);
    Ensure(!is_free[page], "the free list names page ", page, " twice");
    Ensure(num_entries[page] == 0, "page ", page, " is both free and owned");
    is_free[page] = true;
  }
  for (int64_t page = 0; page < num_pages(); ++page) {
    Ensure(ref_counts_[page] == num_entries[page], "page ", page, " has reference count ", ref_counts_[page], " and ",
           num_entries[page], " table entries");
  }
  const int64_t owned = num_pages() - std::count(num_entries.begin(), num_entries.end(), 0);
  const int64_t cached = 0;  // unreferenced pages kept for prefix sharing: none before there is sharing
  Ensure(num_free() + cached + owned == num_pages(), num_free(), " free + ", cached, " cached + ", owned,
         " owned pages, expected ", num_pages(), " in all");
}

}  // namespace layerskip
