#include "prefix_index.h"

#include <algorithm>
#include <cstring>

#include "errors.h"

namespace layerskip {
namespace {

constexpr char kDomain[] = "layerskip_kernels prefix 1";

void UpdateField(Sha256& sha, char tag, const void* data, size_t size) {
  sha.Update(&tag, 1);
  sha.UpdateUint64(size);
  sha.Update(data, size);
}

Sha256 StartName() {
  Sha256 sha;
  UpdateField(sha, 'D', kDomain, sizeof(kDomain) - 1);
  return sha;
}

size_t NumBuckets(int64_t num_pages) {
  size_t count = 1;
  while (count < static_cast<size_t>(num_pages)) count *= 2;
  return count;
}

}  // namespace

Digest RootName(const std::string& identity, const std::optional<std::string>& salt) {
  Sha256 sha = StartName();
  UpdateField(sha, 'M', identity.data(), identity.size());
  if (salt) UpdateField(sha, 'S', salt->data(), salt->size());
  return sha.Finish();
}

Digest PageName(const Digest& parent, const int32_t* tokens, int64_t num_tokens) {
  Sha256 sha = StartName();
  UpdateField(sha, 'P', parent.data(), parent.size());
  const char tag = 'T';
  sha.Update(&tag, 1);
  sha.UpdateUint64(static_cast<uint64_t>(num_tokens) * sizeof(int32_t));
  for (int64_t i = 0; i < num_tokens; ++i) {
    const auto token = static_cast<uint32_t>(tokens[i]);
    const uint8_t bytes[4] = {static_cast<uint8_t>(token), static_cast<uint8_t>(token >> 8),
                              static_cast<uint8_t>(token >> 16), static_cast<uint8_t>(token >> 24)};
    sha.Update(bytes, sizeof(bytes));
  }
  return sha.Finish();
}

PrefixIndex::PrefixIndex(int64_t num_pages, int64_t page_size)
    : page_size_(page_size),
      entries_(num_pages),
      tokens_(num_pages * page_size),
      buckets_(NumBuckets(num_pages), kNoPage) {}

PageId PrefixIndex::Find(const Digest& name, const Digest& parent, const int32_t* tokens) const {
  const PageId page = FindName(name);
  if (page == kNoPage) return kNoPage;
  const bool same = entries_[page].parent == parent && std::equal(tokens, tokens + page_size_, TokensOf(page));
  return same ? page : kNoPage;
}

void PrefixIndex::Insert(PageId page, const Digest& name, const Digest& parent, const int32_t* tokens) {
  Ensure(!Has(page), "page ", page, " is named twice");
  if (FindName(name) != kNoPage) return;
  PageId& head = buckets_[BucketOf(name)];
  entries_[page] = {name, parent, head, true};
  std::copy(tokens, tokens + page_size_, tokens_.begin() + page * page_size_);
  head = page;
}

void PrefixIndex::Erase(PageId page) {
  PageId* link = &buckets_[BucketOf(NameOf(page))];
  while (*link != page) link = &entries_[*link].next;
  *link = entries_[page].next;
  entries_[page].named = false;
}

size_t PrefixIndex::BucketOf(const Digest& name) const {
  uint64_t key;
  std::memcpy(&key, name.data(), sizeof(key));
  return key & (buckets_.size() - 1);
}

PageId PrefixIndex::FindName(const Digest& name) const {
  PageId page = buckets_[BucketOf(name)];
  while (page != kNoPage && entries_[page].name != name) page = entries_[page].next;
  return page;
}

void PrefixIndex::CheckIntegrity() const {
  const auto num_pages = static_cast<PageId>(entries_.size());
  int64_t num_linked = 0;
  for (const PageId head : buckets_) {
    for (PageId page = head; page != kNoPage; page = entries_[page].next) {
      Ensure(0 <= page && page < num_pages, "the prefix index names page ", page, " outside 0..", num_pages - 1);
      Ensure(++num_linked <= num_pages, "the prefix index goes in a circle");
      Ensure(Has(page), "page ", page, " is in the prefix index without a name");
    }
  }
  for (PageId page = 0; page < num_pages; ++page) {
    if (!Has(page)) continue;
    --num_linked;
    Ensure(FindName(NameOf(page)) == page, "page ", page, " is not found by its name");
    Ensure(PageName(entries_[page].parent, TokensOf(page), page_size_) == NameOf(page), "page ", page,
           " has not the name of its tokens");
  }
  Ensure(num_linked == 0, "the prefix index holds ", num_linked, " entries too many");
}

}  // namespace layerskip
