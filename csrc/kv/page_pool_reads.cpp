// What can be read of a page pool, and the proof that it is whole. Every public function holds the lock from its first
// line to its last.
#include <algorithm>
#include <functional>
#include <utility>

#include "page_pool.h"

namespace layerskip {

int64_t PagePool::num_free() const {
  const Lock lock(mutex_);
  return pages_.num_free();
}

int64_t PagePool::num_cached() const {
  const Lock lock(mutex_);
  return pages_.num_cached();
}

int64_t PagePool::num_available() const {
  const Lock lock(mutex_);
  return pages_.num_available();
}

int64_t PagePool::num_sequences() const {
  const Lock lock(mutex_);
  return static_cast<int64_t>(sequences_.size());
}

PoolStats PagePool::Stats() const {
  const Lock lock(mutex_);
  std::vector<int64_t> used(num_pages(), 0);
  for (const auto& [id, seq] : sequences_) {
    for (size_t i = 0; i < seq.pages.size(); ++i) {
      const int64_t rows = std::min(page_size_, seq.length() - static_cast<int64_t>(i) * page_size_);
      used[seq.pages[i]] = std::max(used[seq.pages[i]], rows);
    }
  }

  PoolStats stats{};
  stats.num_free = pages_.num_free();
  stats.num_cached = pages_.num_cached();
  for (PageId page = 0; page < num_pages(); ++page) {
    stats.num_owned += pages_.ref_count(page) > 0;
    stats.num_shared += pages_.ref_count(page) > 1;
    stats.used_positions += used[page];
  }
  stats.unused_positions = stats.num_owned * page_size_ - stats.used_positions;
  stats.num_sequences = static_cast<int64_t>(sequences_.size());
  stats.queried_tokens = queried_tokens_;
  stats.hit_tokens = hit_tokens_;
  stats.num_evictions = pages_.num_evictions();
  stats.num_copies = num_copies_;
  return stats;
}

int64_t PagePool::PagesNeeded(const std::vector<SequenceId>& seqs, const std::vector<int64_t>& counts) const {
  const Lock lock(mutex_);
  return PlanGrowth(const_cast<PagePool*>(this)->FindBatch(seqs, counts, "counts"), counts).num_pages;
}

int64_t PagePool::NumPublished(SequenceId id) const {
  const Lock lock(mutex_);
  return static_cast<int64_t>(Find(id).names.size());
}

int64_t PagePool::Length(SequenceId id) const {
  const Lock lock(mutex_);
  return Find(id).length();
}

int64_t PagePool::Committed(SequenceId id) const {
  const Lock lock(mutex_);
  return Find(id).committed;
}

std::vector<int32_t> PagePool::Depths(SequenceId id) const {
  const Lock lock(mutex_);
  return Find(id).depths;
}

std::vector<PageId> PagePool::Pages(SequenceId id) const {
  const Lock lock(mutex_);
  return Find(id).pages;
}

int64_t PagePool::RefCount(int64_t page) const {
  const Lock lock(mutex_);
  Require(0 <= page && page < num_pages(), "page must be in 0..", num_pages() - 1, ", got ", page);
  return pages_.ref_count(static_cast<PageId>(page));
}

std::optional<Digest> PagePool::NameOf(int64_t page) const {
  const Lock lock(mutex_);
  Require(0 <= page && page < num_pages(), "page must be in 0..", num_pages() - 1, ", got ", page);
  if (!pages_.IsNamed(static_cast<PageId>(page))) return std::nullopt;
  return pages_.index().NameOf(static_cast<PageId>(page));
}

std::vector<int64_t> PagePool::Lengths(const std::vector<SequenceId>& seqs) const {
  const Lock lock(mutex_);
  std::vector<int64_t> lengths;
  lengths.reserve(seqs.size());
  for (const SequenceId id : seqs) lengths.push_back(Find(id).length());
  return lengths;
}

std::vector<int64_t> PagePool::CommittedLengths(const std::vector<SequenceId>& seqs) const {
  const Lock lock(mutex_);
  std::vector<int64_t> lengths;
  lengths.reserve(seqs.size());
  for (const SequenceId id : seqs) lengths.push_back(Find(id).committed);
  return lengths;
}

BlockTable PagePool::MakeBlockTable(const std::vector<SequenceId>& seqs) const {
  const Lock lock(mutex_);
  size_t columns = 1;  // a kernel never sees an empty table
  for (const SequenceId id : seqs) columns = std::max(columns, Find(id).pages.size());

  std::vector<PageId> entries(seqs.size() * columns, kNoPage);
  for (size_t i = 0; i < seqs.size(); ++i) {
    const std::vector<PageId>& pages = Find(seqs[i]).pages;
    std::copy(pages.begin(), pages.end(), entries.begin() + i * columns);
  }
  return {static_cast<int64_t>(seqs.size()), static_cast<int64_t>(columns), std::move(entries)};
}

PendingDepths PagePool::MakePendingDepths(const std::vector<SequenceId>& seqs) const {
  const Lock lock(mutex_);
  PendingDepths pending{{}, {0}};
  for (const SequenceId id : seqs) {
    const std::vector<int32_t>& depths = Find(id).depths;
    pending.depths.insert(pending.depths.end(), depths.begin(), depths.end());
    pending.starts.push_back(static_cast<int32_t>(pending.depths.size()));
  }
  return pending;
}

bool PagePool::IsStaircase(const std::vector<int32_t>& depths, int64_t num_layers) {
  if (depths.empty()) return true;
  return depths.front() <= num_layers && depths.back() >= 0 &&
         std::is_sorted(depths.begin(), depths.end(), std::greater<>());
}

void PagePool::CheckIntegrity() const {
  const Lock lock(mutex_);
  std::vector<int32_t> num_entries(num_pages(), 0);
  for (const auto& [id, seq] : sequences_) {
    CheckSequence(id, seq);
    for (const PageId page : seq.pages) ++num_entries[page];
  }
  pages_.CheckIntegrity(num_entries);
  for (const auto& [id, seq] : sequences_) CheckSharing(id, seq);
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

void PagePool::CheckSharing(SequenceId id, const Sequence& seq) const {
  for (size_t i = 0; i < seq.pages.size(); ++i) {
    const PageId page = seq.pages[i];
    const bool pending = static_cast<int64_t>(i + 1) * page_size_ > seq.committed && seq.committed < seq.length();
    Ensure(!pending || (pages_.ref_count(page) == 1 && !pages_.IsNamed(page)), "page ", page,
           " is shared or has a name, and sequence ", id, " has pending rows in it");
    Ensure(i >= seq.names.size() || !pages_.IsNamed(page) || pages_.index().NameOf(page) == seq.names[i], "page ", page,
           " has another name than sequence ", id, " published");
  }
  Ensure(static_cast<int64_t>(seq.names.size()) * page_size_ <= seq.committed, "sequence ", id, " published ",
         seq.names.size(), " pages with ", seq.committed, " committed rows");
}

}  // namespace layerskip
