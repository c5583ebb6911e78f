// The page pool: which pages a sequence holds, how long it is, and how deep each of its pending rows is.
//
// Bookkeeping only. K, V and the kept hidden states live in tensors elsewhere, indexed by the page ids given
// out here; the pool owns its tables and nothing else, and what it returns is a copy.
//
// The staircase: the first `committed` rows of a sequence have passed all layers; each row after them is
// pending, with a depth (layers passed) that never rises along the sequence.
//
// Sharing: a page may stand in the tables of several sequences, by Fork, or by AddSequence finding committed full
// pages with the same tokens from the start (page_list.h, prefix_index.h). Nobody writes into a shared page: Append
// copies it first where the new rows would begin inside it. So a page with pending rows has one owner and no name.
//
// Check, then act: a call that throws has changed nothing, over its whole batch, also when the host is out of
// memory (std::bad_alloc). What the caller got wrong is std::invalid_argument, too few pages is CacheFull, a broken
// invariant is std::logic_error. (Cached pages may have been evicted; those were nobody's.)
//
// Thread-safe: each call is atomic, under the pool's mutex, for a fork meanwhile as well. A series of calls about one
// sequence belongs to one thread at a time, and its rows' tensors with it.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "errors.h"
#include "fork_safe_mutex.h"
#include "page_list.h"
#include "prefix_index.h"

namespace layerskip {

using SequenceId = int64_t;

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

struct PoolStats {
  int64_t num_free, num_cached, num_owned;  // pages; together all of them
  int64_t num_shared;                       // of the owned ones: in more than one table
  int64_t num_sequences;
  int64_t used_positions;    // of the owned pages; one that several sequences share counts once
  int64_t unused_positions;  // of the owned pages: less than a page per sequence
  int64_t queried_tokens;    // of the prompts looked up for sharing, since the pool was made
  int64_t hit_tokens;        // of these, found
  int64_t num_evictions;
  int64_t num_copies;  // of pages, before a write into a shared one
};

struct PoolOptions {
  // What the pages' contents depend on besides tokens (the model's weights); given, prompts share their beginnings.
  std::optional<std::string> identity;
  // Copies a page's contents; called before the tables change, with the pool locked. What it throws goes to the
  // caller of Append, and then nothing has changed.
  std::function<void(PageId source, PageId target)> copy_page;
};

class PagePool {
 public:
  PagePool(int64_t num_pages, int64_t page_size, int64_t num_layers, PoolOptions options = {});
  PagePool(const PagePool&) = delete;
  PagePool& operator=(const PagePool&) = delete;

  int64_t num_pages() const { return pages_.size(); }
  int64_t page_size() const { return page_size_; }
  int64_t num_layers() const { return num_layers_; }
  bool shares_prefixes() const { return options_.identity.has_value(); }
  int64_t num_free() const;
  int64_t num_cached() const;
  int64_t num_available() const;  // free and cached: what an Append can have
  int64_t num_sequences() const;
  PoolStats Stats() const;

  // An empty sequence, or, where prefixes are shared, one that begins with committed pages found for `tokens`; at
  // least the last token is left to be computed. Sequences of different salts share nothing. An id is never given
  // out twice.
  SequenceId AddSequence(const std::vector<int32_t>& tokens = {}, const std::optional<std::string>& salt = {});
  // A sequence with the same rows, all committed, on the same pages.
  SequenceId Fork(SequenceId id);
  void FreeSequence(SequenceId id);

  // Moves over a batch of distinct sequences, one value for each.
  void Append(const std::vector<SequenceId>& seqs, const std::vector<int64_t>& counts);
  void RaiseRows(const std::vector<SequenceId>& seqs, const std::vector<int64_t>& stops, int64_t depth);
  void Commit(const std::vector<SequenceId>& seqs, const std::vector<int64_t>& lengths);
  // Pages that Append would take, copies included.
  int64_t PagesNeeded(const std::vector<SequenceId>& seqs, const std::vector<int64_t>& counts) const;

  // Names the sequence's next full pages that have none, NumPublished on, by their tokens, so that others find them.
  void Publish(SequenceId id, const std::vector<int32_t>& tokens);
  int64_t NumPublished(SequenceId id) const;

  void Truncate(SequenceId id, int64_t new_length);
  void Rollback(SequenceId id);

  int64_t Length(SequenceId id) const;
  int64_t Committed(SequenceId id) const;
  std::vector<int32_t> Depths(SequenceId id) const;
  std::vector<PageId> Pages(SequenceId id) const;
  int64_t RefCount(int64_t page) const;
  // The end of the SHA-256 chain that the page can be found by, if it can.
  std::optional<Digest> NameOf(int64_t page) const;

  // Views of a batch for the kernels; an id may come twice.
  std::vector<int64_t> Lengths(const std::vector<SequenceId>& seqs) const;
  std::vector<int64_t> CommittedLengths(const std::vector<SequenceId>& seqs) const;
  BlockTable MakeBlockTable(const std::vector<SequenceId>& seqs) const;
  PendingDepths MakePendingDepths(const std::vector<SequenceId>& seqs) const;

  // Throws std::logic_error naming the first thing found broken. O(pages + rows).
  void CheckIntegrity() const;

 private:
  friend struct PagePoolPeer;  // tests/cpp breaks what CheckIntegrity must find

  // The length is derived, so that it cannot disagree with the rows.
  struct Sequence {
    std::vector<PageId> pages;
    int64_t committed = 0;
    std::vector<int32_t> depths;  // of the pending rows, first to last
    Digest root{};                // where the names of its pages begin
    std::vector<Digest> names;    // of its first pages, published or found
    int64_t length() const { return committed + static_cast<int64_t>(depths.size()); }
  };

  // Page `source`, entry `index` of the table of batch[row], is copied before a write.
  struct Copy {
    size_t row;
    size_t index;
    PageId source;
  };

  // What an Append takes.
  struct Growth {
    std::vector<Copy> copies;
    int64_t num_pages;  // copies included
  };

  using Lock = ForkSafeLock;

  static bool IsStaircase(const std::vector<int32_t>& depths, int64_t num_layers);

  const Sequence& Find(SequenceId id) const;
  Sequence& Find(SequenceId id);
  std::vector<Sequence*> FindBatch(const std::vector<SequenceId>& seqs, const std::vector<int64_t>& values,
                                   const char* values_name);

  SequenceId Insert(Sequence seq);
  void FindPrefix(Sequence& seq, const std::vector<int32_t>& tokens) const;

  int64_t NumPagesFor(int64_t length) const;
  int64_t NumNewPages(const Sequence& seq, int64_t count) const;
  bool WritesInside(const Sequence& seq, int64_t count) const;
  Growth PlanGrowth(const std::vector<Sequence*>& batch, const std::vector<int64_t>& counts) const;
  void Grow(Sequence& seq, int64_t count);

  void Cut(Sequence& seq, int64_t new_length);
  void GiveBackUnused(Sequence& seq);

  void CheckSequence(SequenceId id, const Sequence& seq) const;
  void CheckSharing(SequenceId id, const Sequence& seq) const;

  const int64_t page_size_;
  const int64_t num_layers_;
  const PoolOptions options_;

  mutable ForkSafeMutex mutex_;  // guards all that follows
  PageList pages_;
  std::unordered_map<SequenceId, Sequence> sequences_;
  SequenceId next_id_ = 0;
  int64_t queried_tokens_ = 0;
  int64_t hit_tokens_ = 0;
  int64_t num_copies_ = 0;
};

}  // namespace layerskip
