#include "page_list.h"

#include <algorithm>
#include <numeric>

#include "errors.h"

namespace layerskip {

PageList::PageList(int64_t num_pages, int64_t page_size, bool sharing)
    : sharing_(sharing),
      index_(sharing ? num_pages : 0, page_size),
      ref_counts_(num_pages, 0),
      free_(num_pages),
      ring_(num_pages + 1) {
  std::iota(free_.rbegin(), free_.rend(), 0);  // the top of the stack is page 0
  ring_.back() = {ring_end(), ring_end()};
}

void PageList::Clear(int64_t count) {
  while (num_free() < count) Evict();
}

PageId PageList::Take() {
  Clear(1);
  const PageId page = free_.back();
  free_.pop_back();
  ref_counts_[page] = 1;
  return page;
}

void PageList::Retain(PageId page) {
  if (ref_counts_[page]++ == 0) Unlink(page);  // owned by nobody and still named somewhere: cached
}

void PageList::Release(PageId page) {
  Ensure(ref_counts_[page] > 0, "released page ", page, ", which is not owned");
  if (--ref_counts_[page] > 0) return;
  if (IsNamed(page)) {
    LinkLast(page);
  } else {
    free_.push_back(page);
  }
}

void PageList::Unname(PageId page) {
  if (IsNamed(page)) index_.Erase(page);
}

void PageList::LinkLast(PageId page) {
  const PageId last = ring_[ring_end()].previous;
  ring_[page] = {last, ring_end()};
  ring_[last].next = page;
  ring_[ring_end()].previous = page;
  ++num_cached_;
}

void PageList::Unlink(PageId page) {
  const auto [previous, next] = ring_[page];
  ring_[previous].next = next;
  ring_[next].previous = previous;
  --num_cached_;
}

void PageList::Evict() {
  const PageId oldest = ring_[ring_end()].next;
  Ensure(oldest != ring_end(), "no page is free or cached");
  Unlink(oldest);
  index_.Erase(oldest);
  free_.push_back(oldest);
  ++num_evictions_;
}

void PageList::CheckIntegrity(const std::vector<int32_t>& num_entries) const {
  std::vector<bool> seen(size(), false);
  CheckFree(num_entries, seen);
  CheckCached(num_entries, seen);
  for (PageId page = 0; page < size(); ++page) {
    Ensure(ref_counts_[page] == num_entries[page], "page ", page, " has reference count ", ref_counts_[page], " and ",
           num_entries[page], " table entries");
  }
  const int64_t owned = size() - std::count(num_entries.begin(), num_entries.end(), 0);
  Ensure(num_free() + num_cached_ + owned == size(), num_free(), " free + ", num_cached_, " cached + ", owned,
         " owned pages, expected ", size(), " in all");
  if (sharing_) index_.CheckIntegrity();
}

void PageList::CheckFree(const std::vector<int32_t>& num_entries, std::vector<bool>& seen) const {
  for (const PageId page : free_) {
    Ensure(0 <= page && page < size(), "the free list names page ", page, " outside 0..", size() - 1);
    Ensure(!seen[page], "the free list names page ", page, " twice");
    Ensure(num_entries[page] == 0, "page ", page, " is both free and owned");
    Ensure(!IsNamed(page), "page ", page, " is free and has a name");
    seen[page] = true;
  }
}

void PageList::CheckCached(const std::vector<int32_t>& num_entries, std::vector<bool>& seen) const {
  int64_t count = 0;
  PageId before = ring_end();
  for (PageId page = ring_[ring_end()].next; page != ring_end(); page = ring_[page].next) {
    Ensure(0 <= page && page < size(), "the cached list names page ", page, " outside 0..", size() - 1);
    Ensure(!seen[page], "page ", page, " is cached twice, or free as well");
    Ensure(num_entries[page] == 0, "page ", page, " is both cached and owned");
    Ensure(IsNamed(page), "page ", page, " is cached and has no name");
    Ensure(ring_[page].previous == before, "page ", page, " is linked wrongly among the cached pages");
    seen[page] = true;
    before = page;
    ++count;
  }
  Ensure(count == num_cached_ && ring_[ring_end()].previous == before, "the cached list has ", count,
         " pages, expected ", num_cached_);
}

}  // namespace layerskip
