// Which page holds which tokens: committed full pages by name, so that a sequence with the same beginning can
// share them.
//
// A page's name is the end of a SHA-256 chain over tagged, length-prefixed fields: the model's identity and the
// salt, then, page by page, the name before and the token ids. Equal names mean equal K and V, since those follow
// from the tokens up to here and the model alone; the salt keeps tenants apart. On a hit the token ids and the name
// before are compared as well.
//
// All memory is taken when the index is made: nothing here can run out of it later.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "sha256.h"

namespace layerskip {

using PageId = int32_t;

// An entry of a block table beyond a sequence's last page; a page that is not there.
inline constexpr PageId kNoPage = -1;

// The start of a chain. No salt and an empty salt are two different ones.
Digest RootName(const std::string& identity, const std::optional<std::string>& salt);

// The name of a page with these tokens behind a page (or the root) named `parent`.
Digest PageName(const Digest& parent, const int32_t* tokens, int64_t num_tokens);

class PrefixIndex {
 public:
  PrefixIndex(int64_t num_pages, int64_t page_size);

  // The page of that name, or kNoPage. `tokens`: page_size of them.
  PageId Find(const Digest& name, const Digest& parent, const int32_t* tokens) const;

  // Names a page that has no name yet, unless another page has that name already: the first one keeps it.
  void Insert(PageId page, const Digest& name, const Digest& parent, const int32_t* tokens);
  void Erase(PageId page);

  bool Has(PageId page) const { return entries_[page].named; }
  const Digest& NameOf(PageId page) const { return entries_[page].name; }

  // Throws std::logic_error unless each named page is found once, by its name, and no other is.
  void CheckIntegrity() const;

 private:
  friend struct PagePoolPeer;

  struct Entry {
    Digest name;
    Digest parent;
    PageId next = kNoPage;  // in its bucket
    bool named = false;
  };

  const int32_t* TokensOf(PageId page) const { return tokens_.data() + page * page_size_; }
  size_t BucketOf(const Digest& name) const;
  PageId FindName(const Digest& name) const;

  int64_t page_size_;
  std::vector<Entry> entries_;   // by page
  std::vector<int32_t> tokens_;  // [pages, page_size]
  std::vector<PageId> buckets_;  // a power of two of them; the first page of each
};

}  // namespace layerskip
