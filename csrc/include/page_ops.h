// What moves data in the paged cache: one body for the host and the device.
//
// An op is a struct of pointers and sizes whose work is cut into blocks. RunBlocks runs them here, one lane each;
// csrc/cuda/cache_kernels.cu runs the same lines with one thread block per block. Nothing in here is arithmetic on
// floats: elements are moved as bits. Torch-free.
//
// Every index that came as data is guarded. A bad one is skipped and written into the error record, so that no op
// ever touches memory outside its tensors, and none has to wait for the host.
//
// Layouts: k pages [P, G, K, S], v pages [P, G, S, K] (page, KV head, head dim, position in the page), L of them
// one after the other in a cache; hidden pages [P, S, D].
#pragma once

#include <cstdint>

#include "contract.h"

namespace layerskip {

// ---- the error record: one int64, 0 while nothing was refused ----

// What an op refuses; layerskip_kernels/ops/cache_ops.py says it in words.
enum class Refusal : int64_t {
  kColumn = 1,   // a position beyond the list of pages
  kPage = 2,     // a page outside the cache
  kOverlap = 3,  // a page written by one move and touched by another: their order is not fixed
};

inline constexpr int kRefusalShift = 48;
inline constexpr int64_t kMaxRefusedIndex = (int64_t{1} << kRefusalShift) - 1;

// Of several refusals the record keeps the one of the highest kind, and of those the first: whatever the order of
// the threads, the same.
LAYERSKIP_FN void Refuse(int64_t* error, Refusal kind, int64_t index) {
  const int64_t code = (static_cast<int64_t>(kind) << kRefusalShift) | (kMaxRefusedIndex - index);
#if defined(__CUDA_ARCH__)
  atomicMax(reinterpret_cast<long long*>(error), static_cast<long long>(code));
#else
  int64_t seen = __atomic_load_n(error, __ATOMIC_RELAXED);
  while (seen < code && !__atomic_compare_exchange_n(error, &seen, code, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
#endif
}

inline constexpr int64_t kSkip = -1;  // in a list of pages: nothing to do

// ---- whole pages: copy-on-write ----

// A page is 2 L + 1 spans of contiguous bytes: its K and its V in each layer, and its hidden states.
struct CacheView {
  char* k;       // [L, P, kv_bytes]
  char* v;       // [L, P, kv_bytes]
  char* hidden;  // [P, hidden_bytes]
  int64_t num_layers, num_pages, kv_bytes, hidden_bytes;

  LAYERSKIP_FN int64_t NumSpans() const { return 2 * num_layers + 1; }
  LAYERSKIP_FN int64_t SpanBytes(int64_t span) const { return span < 2 * num_layers ? kv_bytes : hidden_bytes; }

  LAYERSKIP_FN char* Span(int64_t page, int64_t span) const {
    if (span < num_layers) return k + (span * num_pages + page) * kv_bytes;
    if (span < 2 * num_layers) return v + ((span - num_layers) * num_pages + page) * kv_bytes;
    return hidden + page * hidden_bytes;
  }
};

template <int kBytes>
struct alignas(kBytes) Word {
  unsigned char bytes[kBytes];
};

template <class W>  // Word<16> where every span is a multiple of it, else a word as wide as the dtype
struct CopyPages {
  CacheView cache;
  const int32_t* sources;  // [N], or kSkip
  const int32_t* targets;  // [N], or kSkip
  int64_t count;
  int64_t* error;

  LAYERSKIP_FN int64_t NumBlocks() const { return count * cache.NumSpans(); }

  LAYERSKIP_FN void operator()(int64_t block, int64_t lane, int64_t lanes) const {
    const int64_t n = block / cache.NumSpans(), span = block % cache.NumSpans();
    if (IsSkipped(n) || IsRefused(n, span == 0 && lane == 0)) return;
    CopyWords(cache.Span(sources[n], span), cache.Span(targets[n], span),
              cache.SpanBytes(span) / static_cast<int64_t>(sizeof(W)), lane, lanes);
  }

 private:
  static constexpr int kInFlight = 4;  // words a lane loads before it stores the first

  LAYERSKIP_FN static W Load(const char* from, int64_t index) {
    W word;
    __builtin_memcpy(&word, __builtin_assume_aligned(from + index * static_cast<int64_t>(sizeof(W)), sizeof(W)),
                     sizeof(W));
    return word;
  }

  LAYERSKIP_FN static void Store(char* to, int64_t index, const W& word) {
    __builtin_memcpy(__builtin_assume_aligned(to + index * static_cast<int64_t>(sizeof(W)), sizeof(W)), &word,
                     sizeof(W));
  }

  LAYERSKIP_FN static void CopyWords(const char* from, char* to, int64_t count, int64_t lane, int64_t lanes) {
    int64_t w = lane;
    for (; w + (kInFlight - 1) * lanes < count; w += kInFlight * lanes) {
      W words[kInFlight];
      for (int i = 0; i < kInFlight; ++i) words[i] = Load(from, w + i * lanes);
      for (int i = 0; i < kInFlight; ++i) Store(to, w + i * lanes, words[i]);
    }
    for (; w < count; w += lanes) Store(to, w, Load(from, w));
  }

  LAYERSKIP_FN bool InCache(int64_t page) const { return 0 <= page && page < cache.num_pages; }
  LAYERSKIP_FN bool IsSkipped(int64_t n) const { return sources[n] == kSkip || targets[n] == kSkip; }

  LAYERSKIP_FN bool IsRefused(int64_t n, bool report) const {
    const bool inside = InCache(sources[n]) && InCache(targets[n]);
    const bool refused = !inside || Overlaps(n);
    if (refused && report) Refuse(error, inside ? Refusal::kOverlap : Refusal::kPage, n);
    return refused;
  }

  // Copies run in any order, so a page that one writes may be neither read nor written by another.
  LAYERSKIP_FN bool Overlaps(int64_t n) const {
    bool found = sources[n] == targets[n];
    for (int64_t m = 0; m < count; ++m) {
      if (m == n || IsSkipped(m)) continue;
      found |= targets[m] == targets[n] || targets[m] == sources[n] || sources[m] == targets[n];
    }
    return found;
  }
};

// ---- positions of a sequence, out of their pages and back into them: export and swaps ----

// T: an unsigned integer as wide as the model's dtype. kOut: from the pages to k and v, else back.
template <class T, bool kOut>
struct MoveKv {
  T* k_cache;            // [L, P, G, K, S]
  T* v_cache;            // [L, P, G, S, K]
  const int32_t* pages;  // [columns]: distinct, a row of a block table
  T* k;                  // [L, length, G, K]
  T* v;                  // [L, length, G, K]
  int64_t start, length, columns, num_layers, num_pages, num_heads, head_dim, page_size;
  int64_t* error;

  LAYERSKIP_FN int64_t NumBlocks() const { return start < length ? num_layers * NumColumns() * num_heads : 0; }

  // A block is one head in one page of one layer. What a refused page should have held is zero; nothing is put there.
  LAYERSKIP_FN void operator()(int64_t block, int64_t lane, int64_t lanes) const {
    const int64_t head = block % num_heads, column = FirstColumn() + block / num_heads % NumColumns();
    const int64_t layer = block / num_heads / NumColumns();
    const int64_t page = column < columns ? pages[column] : kSkip;
    const bool inside = 0 <= page && page < num_pages;
    if (!inside && lane == 0) Refuse(error, column < columns ? Refusal::kPage : Refusal::kColumn, column);
    if (!inside && !kOut) return;
    const int64_t first = column * page_size, last = first + page_size < length ? first + page_size : length;
    const int64_t skipped = first < start ? start - first : 0;
    const int64_t in_cache = ((layer * num_pages + page) * num_heads + head) * page_size * head_dim;
    const int64_t outside = ((layer * length + first) * num_heads + head) * head_dim;
    if (inside)
      Move(k_cache + in_cache, v_cache + in_cache, k + outside, v + outside, skipped, last - first, lane, lanes);
    else
      Clear(k + outside, v + outside, skipped, last - first, lane, lanes);
  }

 private:
  // One head's positions from..to of a page, and where they are outside: apart by a row of all heads.
  LAYERSKIP_FN void Move(T* k_page, T* v_page, T* k_rows, T* v_rows, int64_t from, int64_t to, int64_t lane,
                         int64_t lanes) const {
    for (int64_t e = from * head_dim + lane; e < to * head_dim; e += lanes) {
      const int64_t offset = e / head_dim, d = e - offset * head_dim;
      const int64_t at = offset * num_heads * head_dim + d, k_at = d * page_size + offset;
      if constexpr (kOut) {
        k_rows[at] = k_page[k_at];
        v_rows[at] = v_page[e];
      } else {
        k_page[k_at] = k_rows[at];
        v_page[e] = v_rows[at];
      }
    }
  }

  LAYERSKIP_FN void Clear(T* k_rows, T* v_rows, int64_t from, int64_t to, int64_t lane, int64_t lanes) const {
    for (int64_t e = from * head_dim + lane; e < to * head_dim; e += lanes) {
      const int64_t at = e / head_dim * num_heads * head_dim + e % head_dim;
      k_rows[at] = v_rows[at] = T{0};
    }
  }

  LAYERSKIP_FN int64_t FirstColumn() const { return start / page_size; }
  LAYERSKIP_FN int64_t NumColumns() const { return (length - 1) / page_size + 1 - FirstColumn(); }
};

// Runs some blocks of an op on the host.
template <class Op>
void RunBlocks(const Op& op, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) op(block, 0, 1);
}

}  // namespace layerskip
