// The page pool: which pages a sequence holds, how long it is, and how deep each of its pending rows is.
//
// Bookkeeping only. K, V and the kept hidden states live in tensors elsewhere, indexed by the page ids given
// out here; the pool owns its tables and nothing else, and what it returns is a copy unless it says so.
//
// The staircase: the first `committed` rows of a sequence have passed all layers; each row after them is
// pending, with a depth (layers passed) that never rises along the sequence.
//
// Check, then act: a call that throws has changed nothing, over its whole batch. What the caller got wrong is
// std::invalid_argument, too few pages is CacheFull, a broken invariant is std::logic_error. (Only a host out
// of memory, std::bad_alloc, is beyond this promise.)
//
// Not thread-safe: one pool belongs to one thread at a time.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <unordered_map>
#include <vector>

namespace layerskip {

using SequenceId = int64_t;
using PageId = int32_t;

// Pages ran short: `needed` for the whole call, `free` when it was made.
class CacheFull : public std::runtime_error {
 public:
  CacheFull(int64_t needed, int64_t free);
  int64_t needed;
  int64_t free;
};

// A row-major [rows, columns] table of page ids.
struct BlockTable {
  int64_t rows;
  int64_t columns;
  std::vector<PageId> entries;
};

// The pending rows of a batch, one sequence after the other: those of sequence i are depths[starts[i]] to
// depths[starts[i + 1] - 1].
struct PendingDepths {
  std::vector<int32_t> depths;
  std::vector<int32_t> starts;
};

class PagePool {
 public:
  // Entry of a block table beyond a sequence's last page.
  static constexpr PageId kNoPage = -1;

  PagePool(int64_t num_pages, int64_t page_size, int64_t num_layers);
  PagePool(const PagePool&) = delete;
  PagePool& operator=(const PagePool&) = delete;

  int64_t num_pages() const { return static_cast<int64_t>(ref_counts_.size()); }
  int64_t page_size() const { return page_size_; }
  int64_t num_layers() const { return num_layers_; }
  int64_t num_free() const { return static_cast<int64_t>(free_pages_.size()); }
  int64_t num_sequences() const { return static_cast<int64_t>(sequences_.size()); }

  // An id is never given out twice.
  SequenceId AddSequence();
  void FreeSequence(SequenceId id);

  // Moves over a batch of distinct sequences, one value for each.
  void Append(const std::vector<SequenceId>& seqs, const std::vector<int64_t>& counts);
  void RaiseRows(const std::vector<SequenceId>& seqs, const std::vector<int64_t>& stops, int64_t depth);
  void Commit(const std::vector<SequenceId>& seqs, const std::vector<int64_t>& lengths);

  void Truncate(SequenceId id, int64_t new_length);
  void Rollback(SequenceId id);

  int64_t Length(SequenceId id) const { return Find(id).length(); }
  int64_t Committed(SequenceId id) const { return Find(id).committed; }
  // These two references hold until the next move of the sequence.
  const std::vector<int32_t>& Depths(SequenceId id) const { return Find(id).depths; }
  const std::vector<PageId>& Pages(SequenceId id) const { return Find(id).pages; }
  int64_t RefCount(int64_t page) const;

  // Views of a batch for the kernels; an id may come twice.
  std::vector<int64_t> Lengths(const std::vector<SequenceId>& seqs) const;
  std::vector<int64_t> CommittedLengths(const std::vector<SequenceId>& seqs) const;
  BlockTable MakeBlockTable(const std::vector<SequenceId>& seqs) const;
  PendingDepths MakePendingDepths(const std::vector<SequenceId>& seqs) const;

  // Throws std::logic_error naming the first thing found broken. O(pages + rows).
  void CheckIntegrity() const;

 private:
  friend struct PagePoolPeer;  // tests/cpp/page_pool_test.cpp breaks what CheckIntegrity must find

  // The length is derived, so that it cannot disagree with the rows.
  struct Sequence {
    std::vector<PageId> pages;
    int64_t committed = 0;
    std::vector<int32_t> depths;  // of the pending rows, first to last
    int64_t length() const { return committed + static_cast<int64_t>(depths.size()); }
  };

  const Sequence& Find(SequenceId id) const;
  Sequence& Find(SequenceId id);
  std::vector<Sequence*> FindBatch(const std::vector<SequenceId>& seqs, const std::vector<int64_t>& values,
                                   const char* values_name);

  int64_t NumPagesFor(int64_t length) const;
  int64_t NumNewPages(const Sequence& seq, int64_t count) const;
  void RequirePages(int64_t needed) const;

  // The one place where pages are obtained, and the one where they are given back.
  void TakePages(Sequence& seq, int64_t count);
  void GiveBackUnused(Sequence& seq);

  // One table entry more or fewer names the page; the last one frees it.
  void Retain(PageId page);
  void Release(PageId page);

  void CheckSequence(SequenceId id, const Sequence& seq) const;
  void CheckPages(const std::vector<int32_t>& num_entries) const;

  int64_t page_size_;
  int64_t num_layers_;
  std::vector<int32_t> ref_counts_;  // per page: the table entries that name it
  std::vector<PageId> free_pages_;   // a stack; capacity for all pages, so that giving back never allocates
  std::unordered_map<SequenceId, Sequence> sequences_;
  SequenceId next_id_ = 0;
};

}  // namespace layerskip
