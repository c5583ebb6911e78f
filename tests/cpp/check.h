// What the C++ tests share: one line for each failure, and the number of failures as exit status.
#pragma once

#include <cstdio>
#include <functional>
#include <stdexcept>
#include <string>

#include "../../csrc/kv/page_pool.h"

namespace layerskip {

// Sees, and breaks, what is private.
struct PagePoolPeer {
  PagePool& pool;
  PageList& list() { return pool.pages_; }
  PrefixIndex& index() { return pool.pages_.index_; }
  std::vector<int32_t>& ref_counts() { return pool.pages_.ref_counts_; }
  std::vector<PageId>& free_pages() { return pool.pages_.free_; }
  int64_t& num_cached() { return pool.pages_.num_cached_; }
  PageId& previous(PageId page) { return pool.pages_.ring_[page].previous; }
  PageId& next(PageId page) { return pool.pages_.ring_[page].next; }
  int32_t& token(PageId page, int64_t i) { return index().tokens_[page * pool.page_size() + i]; }
  Digest& parent(PageId page) { return index().entries_[page].parent; }
  Digest& name(PageId page) { return index().entries_[page].name; }
  std::vector<Digest>& names(SequenceId id) { return pool.Find(id).names; }
  std::vector<PageId>& pages(SequenceId id) { return pool.Find(id).pages; }
  std::vector<int32_t>& depths(SequenceId id) { return pool.Find(id).depths; }
  int64_t& committed(SequenceId id) { return pool.Find(id).committed; }
};

inline int num_failures = 0;

inline void Fail(const std::string& message) {
  std::printf("%s\n", message.c_str());
  ++num_failures;
}

template <typename A, typename B>
void ExpectEqual(const std::string& what, const A& got, const B& expected) {
  if (!(got == expected)) Fail(Concat(what, ": got ", got, ", expected ", expected));
}

// The message of the std::logic_error (a broken invariant) or std::invalid_argument (a caller's mistake) thrown.
template <typename Error>
std::string MessageOf(const std::function<void()>& act) {
  try {
    act();
  } catch (const std::exception& error) {
    // std::invalid_argument is a std::logic_error, and must not pass for one.
    const bool wanted = typeid(error) == typeid(Error);
    return (wanted ? "" : "wrong kind of error: ") + std::string(error.what());
  }
  return "no error";
}

// Makes the sequence `tokens` long, all of it committed and published.
inline void Fill(PagePool& pool, SequenceId id, const std::vector<int32_t>& tokens) {
  const auto length = static_cast<int64_t>(tokens.size());
  pool.Append({id}, {length - pool.Length(id)});
  pool.RaiseRows({id}, {length}, pool.num_layers());
  pool.Commit({id}, {length});
  if (!pool.shares_prefixes()) return;
  const auto start = tokens.begin() + pool.NumPublished(id) * pool.page_size();
  pool.Publish(id, {start, tokens.begin() + length / pool.page_size() * pool.page_size()});
}

}  // namespace layerskip
