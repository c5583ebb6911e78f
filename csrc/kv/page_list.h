// The pages of a pool, each in one of three states: free (holds nothing), owned (named by block tables as often as
// its reference count says) or cached (owned by nobody, kept by name for sequences that begin alike). When no page
// is free, the cached page that was used least recently becomes it.
//
// Nothing here allocates after construction, or fails except on a broken invariant.
#pragma once

#include <cstdint>
#include <vector>

#include "prefix_index.h"

namespace layerskip {

class PageList {
 public:
  // `sharing`: whether pages may be named at all.
  PageList(int64_t num_pages, int64_t page_size, bool sharing);

  int64_t size() const { return static_cast<int64_t>(ref_counts_.size()); }
  int64_t num_free() const { return static_cast<int64_t>(free_.size()); }
  int64_t num_cached() const { return num_cached_; }
  int64_t num_available() const { return num_free() + num_cached_; }
  int64_t num_evictions() const { return num_evictions_; }
  int32_t ref_count(PageId page) const { return ref_counts_[page]; }

  // Makes `count` pages free, which must be available, at the cost of cached ones.
  void Clear(int64_t count);
  // The page that the i-th Take from now on gives, of those that are free.
  PageId Upcoming(int64_t i) const { return free_[free_.size() - 1 - i]; }
  // A free page, owned from now on; evicts where there is none.
  PageId Take();

  // One table entry more or fewer names the page.
  void Retain(PageId page);
  void Release(PageId page);

  bool IsNamed(PageId page) const { return sharing_ && index_.Has(page); }
  // Before an owned page's contents change.
  void Unname(PageId page);
  PrefixIndex& index() { return index_; }
  const PrefixIndex& index() const { return index_; }

  // Throws std::logic_error naming what is broken. `num_entries`: table entries by page.
  void CheckIntegrity(const std::vector<int32_t>& num_entries) const;

 private:
  friend struct PagePoolPeer;

  // Cached pages in a ring, the least recently used first; the link behind the last page closes it.
  struct Link {
    PageId previous;
    PageId next;
  };
  PageId ring_end() const { return static_cast<PageId>(size()); }
  void LinkLast(PageId page);
  void Unlink(PageId page);
  void Evict();

  void CheckFree(const std::vector<int32_t>& num_entries, std::vector<bool>& seen) const;
  void CheckCached(const std::vector<int32_t>& num_entries, std::vector<bool>& seen) const;

  bool sharing_;
  PrefixIndex index_;
  std::vector<int32_t> ref_counts_;
  std::vector<PageId> free_;  // a stack; capacity for all pages
  std::vector<Link> ring_;
  int64_t num_cached_ = 0;
  int64_t num_evictions_ = 0;
};

}  // namespace layerskip
