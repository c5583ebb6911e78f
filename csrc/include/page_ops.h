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

// What an op refuses; layerskip_kernels/cache_ops.py says it in words.
enum class Refusal : int64_t {
  kSlot = 1,     // a slot outside the pages
  kColumn = 2,   // a position beyond the block table
  kPage = 3,     // a page outside the cache
  kOverlap = 4,  // a page written by one move and touched by another: their order is not fixed
  kCount = 5,    // accepted counts or lengths that no verification gives
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

inline constexpr int64_t kSkip = -1;            // in a list of slots, pages or counts: nothing to do
inline constexpr int64_t kItemsPerBlock = 256;  // where an item is one number

// ---- append: K and V rows of one layer into its pages ----

template <class T>  // an unsigned integer as wide as the model's dtype
struct AppendKv {
  const T* k;            // [T, G, K]
  const T* v;            // [T, G, K]
  const int64_t* slots;  // [T]: page * S + position in the page, or kSkip
  T* k_pages;            // [P, G, K, S]
  T* v_pages;            // [P, G, S, K]
  int64_t rows, num_pages, num_heads, head_dim, page_size;
  int64_t* error;

  LAYERSKIP_FN int64_t NumBlocks() const { return rows; }

  LAYERSKIP_FN void operator()(int64_t row, int64_t lane, int64_t lanes) const {
    const int64_t slot = slots[row];
    if (slot == kSkip) return;
    if (slot < 0 || slot >= num_pages * page_size) {
      if (lane == 0) Refuse(error, Refusal::kSlot, row);
      return;
    }
    const int64_t page = slot / page_size, offset = slot % page_size;
    const int64_t width = num_heads * head_dim;
    for (int64_t e = lane; e < width; e += lanes) {
      const int64_t head = page * num_heads + e / head_dim, d = e % head_dim;
      k_pages[(head * head_dim + d) * page_size + offset] = k[row * width + e];
      v_pages[(head * page_size + offset) * head_dim + d] = v[row * width + e];
    }
  }
};

// ---- moving whole pages: copy-on-write, out to host memory, back in ----

// A page is 2 L + 1 spans of contiguous bytes: its K and its V in each layer, and its hidden states.
struct CacheView {
  char* k;       // [L, P, kv_bytes]
  char* v;       // [L, P, kv_bytes]
  char* hidden;  // [P, hidden_bytes]
  int64_t num_layers, num_pages, kv_bytes, hidden_bytes;

  LAYERSKIP_FN int64_t NumSpans() const { return 2 * num_layers + 1; }
  LAYERSKIP_FN int64_t SpanBytes(int64_t span) const { return span < 2 * num_layers ? kv_bytes : hidden_bytes; }
  LAYERSKIP_FN int64_t RecordBytes() const { return 2 * num_layers * kv_bytes + hidden_bytes; }

  LAYERSKIP_FN char* Span(int64_t page, int64_t span) const {
    if (span < num_layers) return k + (span * num_pages + page) * kv_bytes;
    if (span < 2 * num_layers) return v + ((span - num_layers) * num_pages + page) * kv_bytes;
    return hidden + page * hidden_bytes;
  }
};

// Where a move begins and ends. A record is one page outside the cache: its spans one after the other.
enum class Direction { kPageToPage, kPageToRecord, kRecordToPage };

template <int kBytes>
struct alignas(kBytes) Word {
  unsigned char bytes[kBytes];
};

template <class W>  // Word<16> where every span is a multiple of it, else a word as wide as the dtype
struct MovePages {
  CacheView cache;
  const int32_t* pages;    // [N]: page n of the move, or kSkip
  const int32_t* targets;  // [N], page to page only
  char* records;           // [N, RecordBytes()], to and from records only
  Direction direction;
  int64_t count;
  int64_t* error;

  LAYERSKIP_FN int64_t NumBlocks() const { return count * cache.NumSpans(); }

  LAYERSKIP_FN void operator()(int64_t block, int64_t lane, int64_t lanes) const {
    const int64_t n = block / cache.NumSpans(), span = block % cache.NumSpans();
    if (IsSkipped(n) || IsRefused(n, span == 0 && lane == 0)) return;
    CopyWords(From(n, span), To(n, span), cache.SpanBytes(span) / static_cast<int64_t>(sizeof(W)), lane, lanes);
  }

 private:
  static constexpr int kInFlight = 4;  // words a lane loads before it stores the first

  LAYERSKIP_FN char* Record(int64_t n, int64_t span) const {
    return records + n * cache.RecordBytes() + span * cache.kv_bytes;  // hidden states come last
  }

  LAYERSKIP_FN const char* From(int64_t n, int64_t span) const {
    return direction == Direction::kRecordToPage ? Record(n, span) : cache.Span(pages[n], span);
  }

  LAYERSKIP_FN char* To(int64_t n, int64_t span) const {
    if (direction == Direction::kPageToRecord) return Record(n, span);
    return cache.Span(direction == Direction::kPageToPage ? targets[n] : pages[n], span);
  }

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

  LAYERSKIP_FN bool IsSkipped(int64_t n) const {
    return pages[n] == kSkip || (direction == Direction::kPageToPage && targets[n] == kSkip);
  }

  LAYERSKIP_FN bool IsRefused(int64_t n, bool report) const {
    const bool inside = InCache(pages[n]) && (direction != Direction::kPageToPage || InCache(targets[n]));
    const bool refused = !inside || Overlaps(n);
    if (refused && report) Refuse(error, inside ? Refusal::kOverlap : Refusal::kPage, n);
    return refused;
  }

  // Moves run in any order, so a page that one writes may be neither read nor written by another.
  LAYERSKIP_FN bool Overlaps(int64_t n) const {
    if (direction == Direction::kPageToRecord) return false;
    bool found = direction == Direction::kPageToPage && pages[n] == targets[n];
    for (int64_t m = 0; m < count; ++m) {
      if (m == n || IsSkipped(m)) continue;
      if (direction == Direction::kPageToPage)
        found |= targets[m] == targets[n] || targets[m] == pages[n] || pages[m] == targets[n];
      else
        found |= pages[m] == pages[n];
    }
    return found;
  }
};

// ---- gather: the first positions of a sequence, out of their pages ----

template <class T>
struct GatherKv {
  const T* k_cache;      // [L, P, G, K, S]
  const T* v_cache;      // [L, P, G, S, K]
  const int32_t* pages;  // [columns]: a row of a block table
  T* k;                  // [L, length, G, K]
  T* v;                  // [L, length, G, K]
  int64_t length, columns, num_layers, num_pages, num_heads, head_dim, page_size;
  int64_t* error;

  LAYERSKIP_FN int64_t NumBlocks() const { return num_layers * NumColumns() * num_heads; }

  // A block is one head in one page of one layer. What a refused page should have held is zero.
  LAYERSKIP_FN void operator()(int64_t block, int64_t lane, int64_t lanes) const {
    const int64_t head = block % num_heads, column = block / num_heads % NumColumns();
    const int64_t layer = block / num_heads / NumColumns();
    const int64_t page = column < columns ? pages[column] : kSkip;
    const bool inside = 0 <= page && page < num_pages;
    if (!inside && lane == 0) Refuse(error, column < columns ? Refusal::kPage : Refusal::kColumn, column);
    const int64_t first = column * page_size;
    const int64_t positions = length - first < page_size ? length - first : page_size;
    const int64_t from = ((layer * num_pages + page) * num_heads + head) * page_size * head_dim;
    const int64_t to = (layer * length + first) * num_heads + head;
    for (int64_t e = lane; e < positions * head_dim; e += lanes) {
      const int64_t offset = e / head_dim, d = e % head_dim;
      const int64_t at = (to + offset * num_heads) * head_dim + d;
      k[at] = inside ? k_cache[from + d * page_size + offset] : T{0};
      v[at] = inside ? v_cache[from + e] : T{0};
    }
  }

 private:
  LAYERSKIP_FN int64_t NumColumns() const { return (length + page_size - 1) / page_size; }
};

// ---- slots: where rows go, out of the block table ----

struct MakeSlotMapping {
  const int32_t* block_table;      // [B, columns]
  const int64_t* positions;        // [T], or kSkip
  const int32_t* query_start_loc;  // [B + 1]: never falling; rows before its first or after its last have no sequence
  int64_t* slots;                  // [T]
  int64_t rows, num_sequences, columns, num_pages, page_size;
  int64_t* error;

  LAYERSKIP_FN int64_t NumBlocks() const { return (rows + kItemsPerBlock - 1) / kItemsPerBlock; }

  LAYERSKIP_FN void operator()(int64_t block, int64_t lane, int64_t lanes) const {
    const int64_t first = block * kItemsPerBlock;
    const int64_t last = first + kItemsPerBlock < rows ? first + kItemsPerBlock : rows;
    for (int64_t row = first + lane; row < last; row += lanes) slots[row] = SlotOf(row);
  }

 private:
  LAYERSKIP_FN int64_t SlotOf(int64_t row) const {
    const int64_t position = positions[row], sequence = SequenceOf(row);
    if (position == kSkip) return kSkip;
    const int64_t column = position / page_size;
    if (position < 0 || column >= columns || sequence < 0 || sequence >= num_sequences) {
      Refuse(error, Refusal::kColumn, row);
      return kSkip;
    }
    const int64_t page = block_table[sequence * columns + column];
    if (page < 0 || page >= num_pages) {
      Refuse(error, Refusal::kPage, row);
      return kSkip;
    }
    return page * page_size + position % page_size;
  }

  // The last sequence that starts at or before the row (sequences without rows start where the next one does).
  LAYERSKIP_FN int64_t SequenceOf(int64_t row) const {
    int64_t low = 0, high = num_sequences + 1;  // the number of starts <= row is in low..high
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (query_start_loc[middle] <= row)
        low = middle + 1;
      else
        high = middle;
    }
    return low - 1;
  }
};

// ---- commit: accepted counts become lengths ----

struct CommitLengths {
  const int64_t* num_accepted;  // [B], or kSkip
  const int64_t* num_drafts;    // [B]
  int64_t* lengths;             // [B]: committed positions, raised by num_accepted + 1
  int64_t count, max_length;
  int64_t* error;

  LAYERSKIP_FN int64_t NumBlocks() const { return (count + kItemsPerBlock - 1) / kItemsPerBlock; }

  LAYERSKIP_FN void operator()(int64_t block, int64_t lane, int64_t lanes) const {
    const int64_t first = block * kItemsPerBlock;
    const int64_t last = first + kItemsPerBlock < count ? first + kItemsPerBlock : count;
    for (int64_t b = first + lane; b < last; b += lanes) CommitOne(b);
  }

 private:
  LAYERSKIP_FN void CommitOne(int64_t b) const {
    const int64_t accepted = num_accepted[b], length = lengths[b];
    if (accepted == kSkip) return;
    if (accepted < 0 || accepted > num_drafts[b] || length < 0 || length > max_length - accepted - 1)
      Refuse(error, Refusal::kCount, b);
    else
      lengths[b] = length + accepted + 1;
  }
};

// Runs some blocks of an op on the host.
template <class Op>
void RunBlocks(const Op& op, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) op(block, 0, 1);
}

}  // namespace layerskip
