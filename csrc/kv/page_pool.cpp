#include "page_pool.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <utility>

namespace layerskip {
namespace {

// Kernels take seq_lens, query_start_loc and page ids as int32.
constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxInt64 = std::numeric_limits<int64_t>::max();

void RequireSize(const char* name, int64_t value) {
  Require(value >= 1 && value <= kMaxInt32, name, " must be in 1..", kMaxInt32, ", got ", value);
}

int64_t CheckedPages(int64_t num_pages, int64_t page_size, int64_t num_layers) {
  RequireSize("num_pages", num_pages);
  RequireSize("page_size", page_size);
  RequireSize("num_layers", num_layers);
  Require(num_pages * page_size <= kMaxInt32, "num_pages * page_size must be at most ", kMaxInt32, ", got ", num_pages,
          " * ", page_size);
  return num_pages;
}

void RequireDistinct(std::vector<SequenceId> seqs) {
  std::sort(seqs.begin(), seqs.end());
  const auto twice = std::adjacent_find(seqs.begin(), seqs.end());
  Require(twice == seqs.end(), "seqs must be distinct, sequence ", twice == seqs.end() ? 0 : *twice,
          " comes more than once");
}

std::vector<int32_t> Raised(std::vector<int32_t> depths, int64_t num_rows, int64_t depth) {
  const auto raise = [depth](int32_t old) { return std::max(old, static_cast<int32_t>(depth)); };
  std::transform(depths.begin(), depths.begin() + num_rows, depths.begin(), raise);
  return depths;
}

// As reserve, but growing by half at least: rows come one by one.
template <typename T>
void ReserveMore(std::vector<T>& values, size_t count) {
  const size_t wanted = values.size() + count;
  if (wanted > values.capacity()) values.reserve(std::max(wanted, values.capacity() + values.capacity() / 2));
}

}  // namespace

PagePool::PagePool(int64_t num_pages, int64_t page_size, int64_t num_layers, PoolOptions options)
    : page_size_(page_size),
      num_layers_(num_layers),
      options_(std::move(options)),
      pages_(CheckedPages(num_pages, page_size, num_layers), page_size, options_.identity.has_value()) {}

SequenceId PagePool::AddSequence(const std::vector<int32_t>& tokens, const std::optional<std::string>& salt) {
  const Lock lock(mutex_);
  Sequence seq;
  if (shares_prefixes()) {
    seq.root = RootName(*options_.identity, salt);
    FindPrefix(seq, tokens);
  }
  const int64_t num_hits = seq.committed;
  const SequenceId id = Insert(std::move(seq));
  if (shares_prefixes()) queried_tokens_ += static_cast<int64_t>(tokens.size());
  hit_tokens_ += num_hits;
  return id;
}

SequenceId PagePool::Fork(SequenceId id) {
  const Lock lock(mutex_);
  const Sequence& seq = Find(id);
  Require(seq.depths.empty(), "sequence ", id, " has ", seq.depths.size(),
          " pending rows; commit or roll back before a fork");
  return Insert(seq);
}

void PagePool::FreeSequence(SequenceId id) {
  const Lock lock(mutex_);
  Cut(Find(id), 0);
  sequences_.erase(id);
}

void PagePool::Append(const std::vector<SequenceId>& seqs, const std::vector<int64_t>& counts) {
  const Lock lock(mutex_);
  const std::vector<Sequence*> batch = FindBatch(seqs, counts, "counts");
  const Growth plan = PlanGrowth(batch, counts);
  if (plan.num_pages > pages_.num_available()) throw CacheFull(plan.num_pages, pages_.num_available());
  for (size_t i = 0; i < batch.size(); ++i) {
    ReserveMore(batch[i]->pages, NumNewPages(*batch[i], counts[i]));
    ReserveMore(batch[i]->depths, counts[i]);
  }
  pages_.Clear(plan.num_pages);
  if (options_.copy_page) {
    for (size_t i = 0; i < plan.copies.size(); ++i) options_.copy_page(plan.copies[i].source, pages_.Upcoming(i));
  }

  for (const Copy& copy : plan.copies) {
    batch[copy.row]->pages[copy.index] = pages_.Take();
    pages_.Release(copy.source);
  }
  for (size_t i = 0; i < batch.size(); ++i) Grow(*batch[i], counts[i]);
  num_copies_ += static_cast<int64_t>(plan.copies.size());
}

void PagePool::RaiseRows(const std::vector<SequenceId>& seqs, const std::vector<int64_t>& stops, int64_t depth) {
  const Lock lock(mutex_);
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
  const Lock lock(mutex_);
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

void PagePool::Publish(SequenceId id, const std::vector<int32_t>& tokens) {
  const Lock lock(mutex_);
  Sequence& seq = Find(id);
  Require(shares_prefixes(), "this pool shares no prefixes; build it with an identity to publish pages");
  const auto first = static_cast<int64_t>(seq.names.size());
  const auto num_tokens = static_cast<int64_t>(tokens.size());
  Require(num_tokens % page_size_ == 0 && num_tokens <= seq.committed - first * page_size_,
          "tokens must be those of full committed pages from page ", first, " on: a multiple of ", page_size_,
          ", at most ", seq.committed - first * page_size_, ", got ", num_tokens);
  std::vector<Digest> names;
  names.reserve(num_tokens / page_size_);
  for (int64_t i = 0; i < num_tokens / page_size_; ++i) {
    const Digest& parent = i > 0 ? names.back() : first > 0 ? seq.names.back() : seq.root;
    names.push_back(PageName(parent, tokens.data() + i * page_size_, page_size_));
    // A fork may have published the page.
    const PageId page = seq.pages[first + i];
    Require(!pages_.IsNamed(page) || pages_.index().NameOf(page) == names.back(), "tokens from ", i * page_size_,
            " on are not those that page ", page, " was published with");
  }
  ReserveMore(seq.names, names.size());

  for (size_t i = 0; i < names.size(); ++i) {
    const PageId page = seq.pages[first + i];
    const Digest& parent = seq.names.empty() ? seq.root : seq.names.back();
    if (!pages_.IsNamed(page)) pages_.index().Insert(page, names[i], parent, tokens.data() + i * page_size_);
    seq.names.push_back(names[i]);
  }
}

void PagePool::Truncate(SequenceId id, int64_t new_length) {
  const Lock lock(mutex_);
  Sequence& seq = Find(id);
  Require(0 <= new_length && new_length <= seq.length(), "new_length must be in 0..", seq.length(),
          " (length of sequence ", id, "), got ", new_length);
  Cut(seq, new_length);
}

void PagePool::Rollback(SequenceId id) {
  const Lock lock(mutex_);
  Sequence& seq = Find(id);
  Cut(seq, seq.committed);
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

SequenceId PagePool::Insert(Sequence seq) {
  const auto [place, inserted] = sequences_.emplace(next_id_, std::move(seq));
  Ensure(inserted, "sequence id ", next_id_, " is given out twice");
  for (const PageId page : place->second.pages) pages_.Retain(page);
  return next_id_++;
}

void PagePool::FindPrefix(Sequence& seq, const std::vector<int32_t>& tokens) const {
  const int64_t num_full = tokens.empty() ? 0 : (static_cast<int64_t>(tokens.size()) - 1) / page_size_;
  for (int64_t i = 0; i < num_full; ++i) {
    const Digest& parent = seq.names.empty() ? seq.root : seq.names.back();
    const int32_t* page_tokens = tokens.data() + i * page_size_;
    const Digest name = PageName(parent, page_tokens, page_size_);
    const PageId page = pages_.index().Find(name, parent, page_tokens);
    if (page == kNoPage) break;
    seq.pages.push_back(page);
    seq.names.push_back(name);
  }
  seq.committed = static_cast<int64_t>(seq.pages.size()) * page_size_;
}

int64_t PagePool::NumPagesFor(int64_t length) const { return length / page_size_ + (length % page_size_ != 0); }

int64_t PagePool::NumNewPages(const Sequence& seq, int64_t count) const {
  // By the room left in the last page, because length + count may overflow.
  const int64_t room = static_cast<int64_t>(seq.pages.size()) * page_size_ - seq.length();
  return NumPagesFor(std::max<int64_t>(count - room, 0));
}

bool PagePool::WritesInside(const Sequence& seq, int64_t count) const {
  return count > 0 && seq.length() % page_size_ != 0;
}

PagePool::Growth PagePool::PlanGrowth(const std::vector<Sequence*>& batch, const std::vector<int64_t>& counts) const {
  Growth growth{{}, 0};
  for (size_t i = 0; i < batch.size(); ++i) {
    Require(counts[i] >= 0, "counts[", i, "] must be at least 0, got ", counts[i]);
    growth.num_pages += std::min(NumNewPages(*batch[i], counts[i]), kMaxInt64 - growth.num_pages);
    if (!WritesInside(*batch[i], counts[i])) continue;
    const PageId page = batch[i]->pages.back();
    if (pages_.ref_count(page) == 1) continue;
    // The last owner left, when all others have copies, keeps the page.
    const auto same = [page](const Copy& copy) { return copy.source == page; };
    const int64_t others = std::count_if(growth.copies.begin(), growth.copies.end(), same);
    if (others + 1 < pages_.ref_count(page)) growth.copies.push_back({i, batch[i]->pages.size() - 1, page});
  }
  const auto num_copies = static_cast<int64_t>(growth.copies.size());
  growth.num_pages += std::min(num_copies, kMaxInt64 - growth.num_pages);
  return growth;
}

void PagePool::Grow(Sequence& seq, int64_t count) {
  if (WritesInside(seq, count)) pages_.Unname(seq.pages.back());  // its contents will be others
  const int64_t num_new = NumNewPages(seq, count);
  for (int64_t i = 0; i < num_new; ++i) seq.pages.push_back(pages_.Take());
  seq.depths.insert(seq.depths.end(), count, 0);
}

void PagePool::Cut(Sequence& seq, int64_t new_length) {
  seq.committed = std::min(seq.committed, new_length);
  seq.depths.resize(new_length - seq.committed);
  const auto num_full = static_cast<size_t>(seq.committed / page_size_);
  seq.names.erase(seq.names.begin() + std::min(num_full, seq.names.size()), seq.names.end());
  GiveBackUnused(seq);
}

void PagePool::GiveBackUnused(Sequence& seq) {
  const size_t used = NumPagesFor(seq.length());
  // From the back, so that the next pages taken are the same ones in the same order, and of a chain of cached pages
  // the end is evicted before what leads to it.
  while (seq.pages.size() > used) {
    pages_.Release(seq.pages.back());
    seq.pages.pop_back();
  }
}

}  // namespace layerskip
