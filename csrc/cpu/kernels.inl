// The bodies of kernels.h, compiled once per instruction set: see isa_*.cpp. Each reads like its line in
// layerskip_kernels/ops/reference; what differs is only which lanes run beside each other.

#include "kernels.h"
#include "simd.h"

namespace layerskip {
namespace {

LAYERSKIP_FN int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
LAYERSKIP_FN int64_t Max(int64_t a, int64_t b) { return a > b ? a : b; }

// Calls f(std::integral_constant<int, n>) for a run-time n in 1..kMax.
template <int kMax, class F>
LAYERSKIP_FN void WithConstant(int64_t n, F f) {
  if constexpr (kMax > 1) {
    if (n < kMax) return WithConstant<kMax - 1>(n, f);
  }
  f(std::integral_constant<int, kMax>{});
}

template <class T>
void Widen(const void* from, int64_t n, float* to) {
  const T* typed = static_cast<const T*>(from);
  for (int64_t i = 0; i < n; ++i) to[i] = ToFloat(typed[i]);
}

template <class T>
void Narrow(const float* from, int64_t n, void* to) {
  T* typed = static_cast<T*>(to);
  for (int64_t i = 0; i < n; ++i) typed[i] = FromFloat<T>(from[i]);
}

void ExpAll(const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = Exp(x[i]);
}

void LogAll(const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = Log(x[i]);
}

void SiluAll(const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = Silu(x[i]);
}

void GeluAll(const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = Gelu(x[i]);
}

void TanhAll(const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = Tanh(x[i]);
}

LAYERSKIP_FN float InverseSqrt(float x) { return 1.0f / __builtin_sqrtf(x); }

void InverseSqrtAll(const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = InverseSqrt(x[i]);
}

// ---- rule 1 ----

// bf16 weights of inputs k and k + 1 (k even) share a 32-bit word, the first in its upper half: what vdpbf16ps adds
// first, and what a mask and a shift unpack elsewhere.
template <class W>
inline constexpr bool kPaired = std::is_same_v<W, BFloat16>;

// Where input i of column `lane` stands in a packed group of K inputs; the last of an odd number of inputs is alone.
template <class W>
LAYERSKIP_FN int64_t PackedAt(int64_t i, int64_t k, int64_t lane) {
  if (!kPaired<W> || (i == k - 1 && k % 2 == 1)) return i * kGroup + lane;
  return (i - i % 2) * kGroup + 2 * lane + (1 - i % 2);
}

// Elements in one packed group of K inputs.
LAYERSKIP_FN int64_t GroupSize(int64_t k) { return k * kGroup; }

// Row-major row -> its lane of a packed group; no row: zeros.
template <class W>
void PackRow(const W* from, int64_t k, int64_t lane, W* group) {
  for (int64_t i = 0; i < k; ++i) group[PackedAt<W>(i, k, lane)] = from == nullptr ? W{} : from[i];
}

template <class W>
void Pack(const void* weight, int64_t n, int64_t k, int64_t group_begin, int64_t group_end, void* packed) {
  const W* from = static_cast<const W*>(weight);
  for (int64_t group = group_begin; group < group_end; ++group) {
    for (int64_t lane = 0; lane < kGroup; ++lane) {
      const int64_t row = group * kGroup + lane;
      PackRow<W>(row < n ? from + row * k : nullptr, k, lane, static_cast<W*>(packed) + group * GroupSize(k));
    }
  }
}

template <class W>
void CopyRow(const void* weight, int64_t row, int64_t k, int64_t to_row, void* packed) {
  const W* from = static_cast<const W*>(weight) + (row / kGroup) * GroupSize(k);
  W* to = static_cast<W*>(packed) + (to_row / kGroup) * GroupSize(k);
  const int64_t lane = row % kGroup, to_lane = to_row % kGroup;
  for (int64_t i = 0; i < k; ++i) to[PackedAt<W>(i, k, to_lane)] = from[PackedAt<W>(i, k, lane)];
}

template <class T>
void Embed(const void* embedding, int64_t token, int64_t hidden_size, float* out) {
  const T* group = static_cast<const T*>(embedding) + (token / kGroup) * hidden_size * kGroup;
  const int64_t lane = token % kGroup;
  for (int64_t d = 0; d < hidden_size; ++d) out[d] = ToFloat(group[PackedAt<T>(d, hidden_size, lane)]);
}

// What one pass over the weights holds in registers: rows x groups accumulators of 16 lanes.
#if defined(LAYERSKIP_AVX512_BF16)
constexpr int kRowsPerPass = 12;
constexpr int GroupsPerPass(int64_t rows) { return rows <= 6 ? 4 : 2; }
#elif defined(LAYERSKIP_AVX512)
constexpr int kRowsPerPass = 6;
constexpr int GroupsPerPass(int64_t) { return 4; }
#elif defined(LAYERSKIP_AVX2)
constexpr int kRowsPerPass = 6;
constexpr int GroupsPerPass(int64_t rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
#else
constexpr int kRowsPerPass = 2;
constexpr int GroupsPerPass(int64_t) { return 1; }
#endif
constexpr int64_t kPassesPerBlock = 8;

// Whether rows that one pass cannot hold are shared out evenly. Eight 8-lane sums, of four rows, are the fewest that
// keep AVX2's multipliers busy; wider ones have enough with any rows, and a full pass has its own advantages
// (pairs.inl).
#if defined(LAYERSKIP_AVX2)
constexpr bool kEvenPasses = true;
#else
constexpr bool kEvenPasses = false;
#endif

// Which of how many passes over a tile's weights that share the fetching of the next ones.
struct Pass {
  int64_t index, count;
};

// Weights are fetched ahead of the arithmetic, because a pass over them is too slow or too fast for the processor's own
// prefetching: into the second-level cache, which has more requests on their way at a time, and with more rows, which
// take longer over each weight, from there into the first (docs/log.md).
//
// The kGroups groups of a tile lie one after the other and are read side by side, the next tile follows. So what is a
// little beyond the end of a group was read long ago, and the next tile begins there. Of several passes over a tile all
// but the first find it in a cache, and the memory would rest: each fetches its share of the next tile's lines.
template <int kRows, int kGroups>
class Ahead {
 public:
  Ahead(const void* tile, int64_t group_bytes, Pass pass)
      : tile_(static_cast<const char*>(tile)),
        group_bytes_(group_bytes),
        far_(pass.count == 1 ? 4096 : group_bytes),
        between_(pass.count - 1),
        wait_(pass.index) {}

  // What is to be fetched while byte `at` of each group is multiplied, a line at a time.
  LAYERSKIP_FN void Fetch(int64_t at) {
    if (wait_-- == 0) {
      FetchLines<2>(At(at + far_));
      wait_ = between_;
    }
    if constexpr (kRows > 2) FetchLines<3>(At(at + 1024));
  }

 private:
  LAYERSKIP_FN const char* At(int64_t at) const {
    return tile_ + at + (at >= group_bytes_ ? (kGroups - 1) * group_bytes_ : 0);
  }
  // One of each group; kLocality as __builtin_prefetch has it: 2 for the second-level cache, 3 for the first.
  template <int kLocality>
  LAYERSKIP_FN void FetchLines(const char* line) const {
    for (int g = 0; g < kGroups; ++g) __builtin_prefetch(line + g * group_bytes_, 0, kLocality);
  }

  const char* tile_;
  int64_t group_bytes_, far_;
  int64_t between_, wait_;  // lines that other passes fetch: from one of this pass to the next, and now
};

// The sum of p(first), ... in a balanced tree of adjacent pairs.
template <int kCount, class P>
LAYERSKIP_FN F32x16 TreeSum(const P& p, int first = 0) {
  if constexpr (kCount == 1) {
    return p(first);
  } else {
    return Add(TreeSum<kCount / 2>(p, first), TreeSum<kCount / 2>(p, first + kCount / 2));
  }
}

// Inputs whose weights, of the 16 columns of a group, fill a cache line.
template <class W>
inline constexpr int kLineInputs = 64 / (kGroup * sizeof(W));

template <class W>
LAYERSKIP_FN F32x16 LoadWeights(const W* group, int64_t k, int64_t i) {
  if constexpr (kPaired<W>) {
    if (i == k - 1 && k % 2 == 1) return Load(group + i * kGroup);
    return i % 2 == 0 ? LoadUpper(group + i * kGroup) : LoadLower(group + (i - 1) * kGroup);
  } else {
    return Load(group + i * kGroup);
  }
}

// x of kRows rows times the weights of an input at a time.
template <class W, int kRows, int kGroups>
struct SingleProducts {
  static constexpr bool kWholeLines = false;
  const float* x;
  int64_t k;
  const W* weight;

  LAYERSKIP_FN void Fold(int64_t i, F32x16 (&acc)[kRows][kGroups]) const {
    F32x16 w[kGroups];
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) w[g] = LoadWeights(weight + g * GroupSize(k), k, i);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const F32x16 x_ri = Broadcast(x[r * k + i]);
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) acc[r][g] = MulAdd<W>(x_ri, w[g], acc[r][g]);
    }
  }

  LAYERSKIP_FN void FoldLine(int64_t i, F32x16 (&acc)[kRows][kGroups], uint32_t&) const {
#pragma GCC unroll 4
    for (int j = 0; j < kLineInputs<W>; ++j) Fold(i + j, acc);
  }
};

// Rule 1 up to the bias, for kRows rows and kGroups groups of columns. Returns what was watched on the way.
template <class W, int kRows, int kGroups, class Products>
LAYERSKIP_FN uint32_t DotTile(const Products& products, int64_t k, const W* weight, Pass pass,
                              F32x16 (&out)[kRows][kGroups]) {
  uint32_t watched = 0;
  Ahead<kRows, kGroups> ahead(weight, GroupSize(k) * sizeof(W), pass);
  constexpr int64_t kLine = kLineInputs<W>;
  const int64_t length = (k + kSegments - 1) / kSegments;
  F32x16 partial[kSegments][kRows][kGroups];
  for (int s = 0; s < kSegments; ++s) {
    int64_t i = Min(s * length, k);
    const int64_t end = Min(i + length, k);
    F32x16 acc[kRows][kGroups];
    for (int r = 0; r < kRows; ++r)
      for (int g = 0; g < kGroups; ++g) acc[r][g] = Zero();
    if constexpr (!Products::kWholeLines)
      for (; i < end && i % kLine != 0; ++i) products.Fold(i, acc);
    for (; i + kLine <= end; i += kLine) {
      ahead.Fetch(i * kGroup * sizeof(W));
      products.FoldLine(i, acc, watched);
    }
    if constexpr (!Products::kWholeLines)
      for (; i < end; ++i) products.Fold(i, acc);
    for (int g = 0; g < kGroups; ++g) {
      for (int r = 0; r < kRows; ++r) partial[s][r][g] = acc[r][g];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int g = 0; g < kGroups; ++g) {
      out[r][g] = TreeSum<kSegments>([&](int s) { return partial[s][r][g]; });
    }
  }
  return watched;
}

// The rows of a block as a tile's dot products read them.
template <class W>
class Operands {
 public:
  Operands(const float* x, int64_t, int64_t k) : x_(x), k_(k) {}

  void NextTile() {}

  // Of rows row .. row + kRows with the columns of kGroups groups from `weight` on.
  template <int kRows, int kGroups>
  LAYERSKIP_FN void Dot(int64_t row, const W* weight, Pass pass, F32x16 (&y)[kRows][kGroups]) {
    DotTile(SingleProducts<W, kRows, kGroups>{x_ + row * k_, k_, weight}, k_, weight, pass, y);
  }

 private:
  const float* x_;
  int64_t k_;
};

#if defined(LAYERSKIP_AVX512_BF16)
#include "pairs.inl"
#endif

// Rule 1 on rows of x, as one thread computes it.
template <class T>
struct LinearTask {
  const float* x;
  int64_t rows, k;
  const T* weight;
  const T* bias;
  int64_t n;
  bool round;
  float* out;

  const T* Group(int64_t group) const { return weight + group * GroupSize(k); }

  // Rows are dealt with in blocks, so that they stay in the second-level cache beside the weights of a tile.
  void Run(int64_t group_begin, int64_t group_end) const {
    for (int64_t first = 0; first < rows; first += kPassesPerBlock * kRowsPerPass)
      RunBlock(first, Min(kPassesPerBlock * kRowsPerPass, rows - first), group_begin, group_end);
  }

  void RunBlock(int64_t first, int64_t count, int64_t group_begin, int64_t group_end) const {
    Operands<T> operands(x + first * k, count, k);
    const int64_t passes = kEvenPasses ? (count + kRowsPerPass - 1) / kRowsPerPass : 1;
    const int64_t rows_at_once = kEvenPasses ? (count + passes - 1) / passes : kRowsPerPass;
    const int64_t groups_at_once = GroupsPerPass(Min(count, rows_at_once));
    for (int64_t group = group_begin; group < group_end; group += groups_at_once) {
      operands.NextTile();
      for (int64_t row = 0; row < count; row += rows_at_once) {
        WithConstant<kRowsPerPass>(Min(rows_at_once, count - row), [&](auto r) {
          constexpr int kRows = decltype(r)::value;
          WithConstant<GroupsPerPass(kRows)>(Min(groups_at_once, group_end - group), [&](auto g) {
            constexpr int kGroups = decltype(g)::value;
            F32x16 y[kRows][kGroups];
            operands.template Dot<kRows, kGroups>(row, Group(group), {row / rows_at_once % passes, passes}, y);
            Finish(first + row, group, y);
          });
        });
      }
    }
  }

  // What is done to the dot products of rows from `row` on and groups of columns from `group` on.
  template <int kRows, int kGroups>
  LAYERSKIP_FN void Finish(int64_t row, int64_t group, const F32x16 (&y)[kRows][kGroups]) const {
    for (int g = 0; g < kGroups; ++g) {
      const int64_t column = (group + g) * kGroup, columns = Min(kGroup, n - column);
      for (int r = 0; r < kRows; ++r) {
        F32x16 value = y[r][g];
        if (bias != nullptr) value = Add(value, LoadFirst(bias + column, columns));
        if (round) value = RoundLanes<T>(value);
        float* to = out + (row + r) * n + column;
        if (columns == kGroup) {
          Store(to, value);
        } else {
          StoreFirst(to, value, columns);
        }
      }
    }
  }
};

template <class T>
void Linear(const float* x, int64_t rows, int64_t k, const void* weight, const void* bias, int64_t n,
            int64_t group_begin, int64_t group_end, bool round, float* out) {
  LinearTask<T>{x, rows, k, static_cast<const T*>(weight), static_cast<const T*>(bias), n, round, out}.Run(group_begin,
                                                                                                           group_end);
}

template <class T>
void Finish(const void* bias, int64_t rows, int64_t n, int64_t group_begin, int64_t group_end, bool round, float* out) {
  const T* b = static_cast<const T*>(bias);
  for (int64_t r = 0; r < rows; ++r) {
    float* y = out + r * n;
    for (int64_t i = group_begin * kGroup; i < Min(group_end * kGroup, n); ++i) {
      if (b != nullptr) y[i] += ToFloat(b[i]);
      if (round) y[i] = Round<T>(y[i]);
    }
  }
}

// ---- rule 2 ----

template <class T>
void RmsNorm(const float* x, const void* weight, int64_t n, NormConstants constants, float* out) {
  float lanes[kNormLanes] = {};
  for (int64_t start = 0; start < n; start += kNormLanes) {
    const int64_t count = Min(kNormLanes, n - start);
    for (int64_t i = 0; i < count; ++i) lanes[i] += x[start + i] * x[start + i];
  }
  for (int width = kNormLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = lanes[2 * i] + lanes[2 * i + 1];
  const float mean = lanes[0] / static_cast<float>(n);
  const float inv = InverseSqrt(mean + constants.eps);
  const T* w = static_cast<const T*>(weight);
  for (int64_t i = 0; i < n; ++i) out[i] = Round<T>(Round<T>(x[i] * inv) * (ToFloat(w[i]) + constants.offset));
}

// ---- elementwise ----

template <class T>
void AddResidual(const float* residual, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = Round<T>(residual[i] + y[i]);
}

template <class T>
void SiluMul(const float* up, int64_t n, float* gate) {
  for (int64_t i = 0; i < n; ++i) gate[i] = Round<T>(Round<T>(Silu(gate[i])) * up[i]);
}

template <class T>
void GeluMul(const float* up, int64_t n, float* gate) {
  for (int64_t i = 0; i < n; ++i) gate[i] = Round<T>(Round<T>(Gelu(gate[i])) * up[i]);
}

template <class T>
void Multiply(float factor, int64_t n, float* x) {
  for (int64_t i = 0; i < n; ++i) x[i] = Round<T>(x[i] * factor);
}

void ScaleLogits(float factor, float cap, int64_t n, float* x) {
  for (int64_t i = 0; i < n; ++i) x[i] = x[i] * factor;
  if (cap != 0.0f)
    for (int64_t i = 0; i < n; ++i) x[i] = SoftCap(x[i], cap);
}

// ---- rule 3 ----

template <class T>
void Rope(const float* cos, const float* sin, int64_t rotary_dim, float* head) {
  const int64_t half = rotary_dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = head[i], b = head[half + i];
    head[i] = Round<T>(a * cos[i] - b * sin[i]);
    head[half + i] = Round<T>(b * cos[i] + a * sin[i]);
  }
}

template <class T>
void Append(const float* k, const float* v, int64_t slot, int64_t kv_heads, int64_t head_dim, int64_t page_size,
            void* k_pages, void* v_pages) {
  const int64_t page = slot / page_size, offset = slot % page_size;
  for (int64_t g = 0; g < kv_heads; ++g) {
    const int64_t tile = (page * kv_heads + g) * head_dim * page_size;
    T* k_tile = static_cast<T*>(k_pages) + tile;
    T* v_row = static_cast<T*>(v_pages) + tile + offset * head_dim;
    for (int64_t d = 0; d < head_dim; ++d) {
      k_tile[d * page_size + offset] = FromFloat<T>(k[g * head_dim + d]);
      v_row[d] = FromFloat<T>(v[g * head_dim + d]);
    }
  }
}

// ---- rule 4 ----

constexpr int kPairs = 6;  // (row, query head) pairs whose scores are folded side by side

// The pairs whose weighted sums of values are, and what fits into registers beside: 16-position tiles of keys, and
// 16-dimension groups of values.
#if defined(LAYERSKIP_AVX512)
constexpr int TilesAtOnce(int) { return 4; }
constexpr int kValuePairs = 3, kValueGroups = 4;
#elif defined(LAYERSKIP_AVX2)
constexpr int TilesAtOnce(int pairs) { return pairs == 1 ? 4 : pairs == 2 ? 3 : pairs == 3 ? 2 : 1; }
constexpr int kValuePairs = 6, kValueGroups = 1;
#else
constexpr int TilesAtOnce(int) { return 1; }
constexpr int kValuePairs = 3, kValueGroups = 1;
#endif

// The pairs of one block and what rule 4 keeps for each.
struct PairBlock {
  const float* q[kPairs];
  float* partial[kPairs];                  // m, l, o[head_dim]
  int64_t first[kPairs], visible[kPairs];  // the pair sees positions first .. visible of this chunk
  int64_t count, least_first, most_visible;

  void Clear() {
    count = most_visible = 0;
    least_first = kChunk;
  }
  alignas(64) float scores[kPairs][kChunk + kLanes];
};

// A run of positions that lie side by side on one page.
template <class T>
struct Run {
  const T* k;  // [K, S] from the first position on
  const T* v;  // [positions, K]
  int64_t positions;
};

// The run from `position` on, of at most `limit` positions.
template <class T>
LAYERSKIP_FN Run<T> RunAt(const PageView& pages, int64_t kv_head, int64_t position, int64_t limit) {
  const int64_t offset = position % pages.page_size;
  const int64_t page = pages.table[position / pages.page_size];
  const int64_t tile = (page * pages.kv_heads + kv_head) * pages.head_dim * pages.page_size;
  return {static_cast<const T*>(pages.k) + tile + offset,
          static_cast<const T*>(pages.v) + tile + offset * pages.head_dim, Min(limit, pages.page_size - offset)};
}

// The first position of a task's chunk that a row sees, counted from the chunk's beginning.
LAYERSKIP_FN int64_t FirstVisible(const ChunkTask& task, int64_t row) {
  if (task.window == 0) return 0;
  return Max(0, task.positions[row] + 1 - task.window - task.chunk * kChunk);
}

// How many positions of its chunk the rows of a task see.
LAYERSKIP_FN int64_t MostVisible(const ChunkTask& task) {
  int64_t last = -1;
  for (int64_t r = 0; r < task.num_rows; ++r) last = Max(last, task.positions[task.rows[r]]);
  return Max(0, Min(kChunk, last + 1 - task.chunk * kChunk));
}

// The first position of its chunk that any of them sees.
LAYERSKIP_FN int64_t LeastVisible(const ChunkTask& task) {
  int64_t first = task.window == 0 ? 0 : Max(0, MostVisible(task) - 1);
  for (int64_t r = 0; task.window != 0 && r < task.num_rows; ++r) first = Min(first, FirstVisible(task, task.rows[r]));
  return first;
}

// Fetches the keys of a task, its values and the keys of the next task, in the order in which they are read but
// kFetchAhead bytes before: a page is a run of memory too short for the processor's own prefetching to catch up
// with (docs/log.md).
template <class T>
class Fetcher {
 public:
  explicit Fetcher(const ChunkTask& task) : task_(&task), next_(task.next) {
    Open(task.pages.k);
    for (int64_t skipped = 0; skipped < kFetchAhead && task_ != nullptr; skipped += tile_bytes_) Advance();
  }

  // The bytes of a cache line for every line's worth of T that the caller is about to read.
  LAYERSKIP_FN void Fetch(int64_t elements) {
    for (int64_t done = 0; done < elements * static_cast<int64_t>(sizeof(T)) && task_ != nullptr; done += kLine) {
      __builtin_prefetch(tile_ + offset_, 0, 2);  // into the second-level cache
      offset_ += kLine;
      if (offset_ >= tile_bytes_) Advance();
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  static constexpr int64_t kFetchAhead = 16384;

  // A page holds one tile of keys and one of values for each KV head.
  void Open(const void* pages) {
    const int64_t begin = task_->chunk * kChunk, page_size = task_->pages.page_size;
    pages_ = static_cast<const char*>(pages);
    tile_bytes_ = task_->pages.head_dim * page_size * static_cast<int64_t>(sizeof(T));
    block_ = (begin + LeastVisible(*task_)) / page_size;
    end_ = (begin + MostVisible(*task_) + page_size - 1) / page_size;
    OpenTile();
  }

  void OpenTile() {
    tile_ = pages_ + (task_->pages.table[block_] * task_->pages.kv_heads + task_->kv_head) * tile_bytes_;
    offset_ = 0;
  }

  void Advance() {
    if (++block_ < end_) return OpenTile();
    if (task_ != next_ && pages_ == task_->pages.k) return Open(task_->pages.v);
    task_ = task_ == next_ ? nullptr : next_;
    if (task_ != nullptr) Open(task_->pages.k);
  }

  const ChunkTask *task_, *next_;
  const char *pages_, *tile_;
  int64_t tile_bytes_, block_, end_, offset_;
};

// Keys of up to 16 positions of a chunk, and where their scores go.
template <class T>
struct KeyTile {
  const T* k;
  int64_t at, lanes;
};

template <class T, int kCount, int kTiles, bool kWhole>
void ScoreTiles(PairBlock& block, const KeyTile<T>* tiles, const PageView& pages, float scale, Fetcher<T>& fetcher) {
  F32x16 acc[kCount][kTiles];
  for (int p = 0; p < kCount; ++p)
    for (int t = 0; t < kTiles; ++t) acc[p][t] = Zero();
  for (int64_t d = 0; d < pages.head_dim; ++d) {
    fetcher.Fetch(kTiles * kLanes);
    F32x16 k_d[kTiles];
#pragma GCC unroll 4
    for (int t = 0; t < kTiles; ++t) {
      const T* k_td = tiles[t].k + d * pages.page_size;
      k_d[t] = kWhole ? Load(k_td) : LoadFirst(k_td, tiles[t].lanes);
    }
#pragma GCC unroll 6
    for (int p = 0; p < kCount; ++p) {
      const F32x16 q_pd = Broadcast(block.q[p][d]);
#pragma GCC unroll 4
      for (int t = 0; t < kTiles; ++t) acc[p][t] = MulAdd<T>(q_pd, k_d[t], acc[p][t]);
    }
  }
  const F32x16 scale_lanes = Broadcast(scale);
  for (int p = 0; p < kCount; ++p)
    for (int t = 0; t < kTiles; ++t) Store(block.scores[p] + tiles[t].at, Mul(acc[p][t], scale_lanes));
}

template <class T>
void Scores(const ChunkTask& task, PairBlock& block, Fetcher<T>& fetcher) {
  KeyTile<T> tiles[kChunk];
  int64_t count = 0;
  for (int64_t done = block.least_first; done < block.most_visible;) {
    // A whole page may be read: positions beyond the visible ones give scores that nobody looks at.
    const Run<T> run = RunAt<T>(task.pages, task.kv_head, task.chunk * kChunk + done, kChunk - done);
    const int64_t needed = Min(run.positions, block.most_visible - done);
    for (int64_t i = 0; i < needed; i += kLanes) tiles[count++] = {run.k + i, done + i, run.positions - i};
    done += needed;
  }
  WithConstant<kPairs>(block.count, [&](auto c) {
    constexpr int kCount = decltype(c)::value;
    for (int64_t first = 0; first < count;) {
      int64_t whole = 0;
      while (whole < TilesAtOnce(kCount) && first + whole < count && tiles[first + whole].lanes >= kLanes) ++whole;
      if (whole == 0) {
        ScoreTiles<T, kCount, 1, false>(block, tiles + first, task.pages, task.scale, fetcher);
      } else {
        WithConstant<TilesAtOnce(kCount)>(whole, [&](auto t) {
          ScoreTiles<T, kCount, decltype(t)::value, true>(block, tiles + first, task.pages, task.scale, fetcher);
        });
      }
      first += Max(whole, 1);
    }
  });
}

// A NaN among the scores need not become the maximum: it stays NaN in exp(s - m), and so in the output.
LAYERSKIP_FN float Largest(const float* s, int64_t n) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = s[0];
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int i = 0; i < kLanes; ++i) lanes[i] = s[j + i] > lanes[i] ? s[j + i] : lanes[i];
  for (; j < n; ++j) lanes[0] = s[j] > lanes[0] ? s[j] : lanes[0];
  for (int i = 1; i < kLanes; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
  return lanes[0];
}

// scores, capped -> p = to_dtype(exp(s - m)) in place; m into the partial results.
template <class T>
void Softmax(PairBlock& block, float cap) {
  for (int64_t p = 0; p < block.count; ++p) {
    float* s = block.scores[p] + block.first[p];
    const int64_t count = block.visible[p] - block.first[p];
    if (cap != 0.0f)
      for (int64_t j = 0; j < count; ++j) s[j] = SoftCap(s[j], cap);
    const float m = Largest(s, count);
    for (int64_t j = 0; j < count; ++j) s[j] = Round<T>(Exp(s[j] - m));
    block.partial[p][0] = m;
  }
}

// Folds `count` positions from v on, `at` in the chunk, into o[d .. d + 16 * kGroups] of kCount pairs, and with
// kSum into l. Unless kWhole, the head ends within the only group.
template <class T, int kCount, int kGroups, bool kWhole, bool kSum>
void FoldValues(PairBlock& block, int64_t first, const T* v, int64_t head_dim, int64_t at, int64_t count, int64_t d,
                Fetcher<T>& fetcher) {
  const int64_t lanes = head_dim - d;
  float l[kCount];
  F32x16 acc[kCount][kGroups];
  for (int p = 0; p < kCount; ++p) {
    const float* partial = block.partial[first + p];
    l[p] = partial[1];
    for (int g = 0; g < kGroups; ++g)
      acc[p][g] = kWhole ? Load(partial + 2 + d + g * kLanes) : LoadFirst(partial + 2 + d, lanes);
  }
  for (int64_t j = 0; j < count; ++j) {
    fetcher.Fetch(kGroups * kLanes);
    F32x16 v_j[kGroups];
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
      const T* v_jd = v + j * head_dim + d + g * kLanes;
      v_j[g] = kWhole ? Load(v_jd) : LoadFirst(v_jd, lanes);
    }
#pragma GCC unroll 6
    for (int p = 0; p < kCount; ++p) {
      const float p_j = block.scores[first + p][at + j];
      if (kSum) l[p] += p_j;
      const F32x16 p_lanes = Broadcast(p_j);
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) acc[p][g] = MulAdd<T>(p_lanes, v_j[g], acc[p][g]);
    }
  }
  for (int p = 0; p < kCount; ++p) {
    float* partial = block.partial[first + p];
    if (kSum) partial[1] = l[p];
    for (int g = 0; g < kGroups; ++g) {
      if (kWhole) {
        Store(partial + 2 + d + g * kLanes, acc[p][g]);
      } else {
        StoreFirst(partial + 2 + d, acc[p][g], lanes);
      }
    }
  }
}

// All dimensions of a run of positions; l goes with the first of them.
template <class T, int kCount, bool kSum = true>
void FoldRun(PairBlock& block, int64_t first, const T* v, int64_t head_dim, int64_t at, int64_t count,
             Fetcher<T>& fetcher, int64_t d = 0) {
  if (d >= head_dim) return;
  const int64_t groups = Min(kValueGroups, (head_dim - d) / kLanes);
  if (groups == 0) return FoldValues<T, kCount, 1, false, kSum>(block, first, v, head_dim, at, count, d, fetcher);
  WithConstant<kValueGroups>(groups, [&](auto g) {
    FoldValues<T, kCount, decltype(g)::value, true, kSum>(block, first, v, head_dim, at, count, d, fetcher);
  });
  FoldRun<T, kCount, false>(block, first, v, head_dim, at, count, fetcher, d + groups * kLanes);
}

// l = fold of p_j, o = fold of p_j * v_j: each pair from its own first position, pairs side by side where all of them
// see, then each to its own end.
template <class T>
void WeightedValues(const ChunkTask& task, PairBlock& block, Fetcher<T>& fetcher) {
  const int64_t head_dim = task.pages.head_dim;
  for (int64_t p = 0; p < block.count; ++p)
    for (int64_t i = 0; i < 1 + head_dim; ++i) block.partial[p][1 + i] = 0.0f;
  for (int64_t first = 0; first < block.count; first += kValuePairs) {
    const int64_t count = Min(kValuePairs, block.count - first);
    int64_t begin = kChunk, shared_begin = 0, shared_end = kChunk, end = 0;
    for (int64_t p = first; p < first + count; ++p) {
      begin = Min(begin, block.first[p]);
      shared_begin = Max(shared_begin, block.first[p]);
      shared_end = Min(shared_end, block.visible[p]);
      end = Max(end, block.visible[p]);
    }
    shared_end = Max(shared_begin, shared_end);
    for (int64_t done = begin; done < end;) {
      const Run<T> run = RunAt<T>(task.pages, task.kv_head, task.chunk * kChunk + done, end - done);
      const int64_t run_end = done + run.positions;
      // Positions from .. to of the run, for one pair.
      const auto alone = [&](int64_t p, int64_t from, int64_t to) {
        from = Max(Max(from, done), block.first[p]);
        to = Min(Min(to, run_end), block.visible[p]);
        if (from < to) FoldRun<T, 1>(block, p, run.v + (from - done) * head_dim, head_dim, from, to - from, fetcher);
      };
      if (done < shared_begin)
        for (int64_t p = first; p < first + count; ++p) alone(p, done, shared_begin);
      const int64_t from = Max(done, shared_begin), together = Min(run_end, shared_end) - from;
      if (together > 0) {
        WithConstant<kValuePairs>(count, [&](auto c) {
          const T* v = run.v + (from - done) * head_dim;
          FoldRun<T, decltype(c)::value>(block, first, v, head_dim, from, together, fetcher);
        });
      }
      if (run_end > shared_end)
        for (int64_t p = first; p < first + count; ++p) alone(p, shared_end, run_end);
      done = run_end;
    }
  }
}

template <class T>
void AttendChunk(const ChunkTask& task) {
  const int64_t head_dim = task.pages.head_dim, heads_per_kv = task.num_heads / task.pages.kv_heads;
  PairBlock block;
  block.Clear();
  Fetcher<T> fetcher(task);
  const auto finish = [&] {
    if (block.count == 0) return;
    Scores<T>(task, block, fetcher);
    Softmax<T>(block, task.cap);
    WeightedValues<T>(task, block, fetcher);
    block.Clear();
  };
  for (int64_t r = 0; r < task.num_rows; ++r) {
    const int64_t row = task.rows[r];
    const int64_t visible = Min(kChunk, task.positions[row] + 1 - task.chunk * kChunk);
    const int64_t first = FirstVisible(task, row);
    if (visible <= first) continue;
    for (int64_t h = 0; h < heads_per_kv; ++h) {
      const int64_t head = row * task.num_heads + task.kv_head * heads_per_kv + h;
      block.q[block.count] = task.q + head * head_dim;
      block.partial[block.count] = task.partials + (head * task.max_chunks + task.chunk) * (2 + head_dim);
      block.first[block.count] = first;
      block.visible[block.count] = visible;
      block.least_first = Min(block.least_first, first);
      block.most_visible = Max(block.most_visible, visible);
      if (++block.count == kPairs) finish();
    }
  }
  finish();
}

template <class T>
void MergeChunks(float* partials, int64_t num_chunks, int64_t head_dim, float* out) {
  float* o = partials + 2;
  for (int64_t c = 1; c < num_chunks; ++c) {
    const float* next = partials + c * (2 + head_dim);
    const float m = next[0] > partials[0] ? next[0] : partials[0];
    const float a = Exp(partials[0] - m), b = Exp(next[0] - m);
    partials[0] = m;
    partials[1] = partials[1] * a + next[1] * b;
    for (int64_t d = 0; d < head_dim; ++d) o[d] = o[d] * a + next[2 + d] * b;
  }
  for (int64_t d = 0; d < head_dim; ++d) out[d] = Round<T>(o[d] / partials[1]);
}

// ---- rule 6 ----

constexpr int64_t kIdsAtATime = 64;  // looked at together, and one by one only where the greatest may be

// Whether any of a group's values plus `more` is not below a limit: is NaN, too.
bool AnyReaches(const float* x, float more, float limit) {
  int32_t any = 0;
  for (int64_t i = 0; i < kIdsAtATime; ++i) any |= !(x[i] + more < limit);
  return any != 0;
}

Maximum Argmax(const float* x, int64_t n) {
  Maximum best{x[0], 0, x[0] != x[0]};
  for (int64_t begin = 0; begin < n; begin += kIdsAtATime) {
    const int64_t end = Min(n, begin + kIdsAtATime);
    if (end == begin + kIdsAtATime && !AnyReaches(x + begin, 0.0f, best.value)) continue;
    for (int64_t i = begin; i < end; ++i) {
      best.has_nan |= x[i] != x[i];
      if (x[i] > best.value) {
        best.value = x[i];
        best.index = i;
      }
    }
  }
  return best;
}

// ---- rule 7 ----

constexpr int64_t kNoiseBlocks = kIdsAtATime / 4;  // counters that serve a group of token ids

void GumbelAll(const uint32_t* words, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = Gumbel(words[i]);
}

// The words of ids 64 * group .. 64 * group + 63: the sixteen counters are lanes.
void NoiseWords(const NoiseKey& key, int64_t group, uint32_t* words) {
  uint32_t lanes[4][kNoiseBlocks];
  for (int64_t i = 0; i < kNoiseBlocks; ++i) {
    const PhiloxWords block = RandomWords(key, static_cast<uint32_t>(group * kNoiseBlocks + i));
    for (int w = 0; w < 4; ++w) lanes[w][i] = block.w[w];
  }
  for (int64_t i = 0; i < kNoiseBlocks; ++i)
    for (int w = 0; w < 4; ++w) words[4 * i + w] = lanes[w][i];
}

// At least the noise of all words from this one on: -log(-log(1 - v)) <= -log(v), and v = (word | 1) * 2^-32. The slack
// is more than rounding makes of it.
float MostNoise(uint32_t word) {
  constexpr float kLog2 = 0.693147182f, kSlack = 0x1p-10f;
  return static_cast<float>(__builtin_clz(word | 1) + 1) * kLog2 + kSlack;
}

// A sum rises with both its parts, rounded or not. So a group whose scores plus the greatest noise that it can have
// stay below a sum that is already there is passed over: before its words are made, where no word could help, else
// before their logarithms.
int64_t GumbelArgmax(const float* scores, int64_t n, const NoiseKey& key, int64_t likeliest) {
  constexpr int64_t L = kIdsAtATime;
  uint32_t words[L];
  float padded[L], sums[L];
  const PhiloxWords first = RandomWords(key, static_cast<uint32_t>(likeliest / 4));
  Maximum best{scores[likeliest] + Gumbel(first.w[likeliest % 4]), likeliest, false};
  for (int64_t begin = 0; begin < n; begin += L) {
    const int64_t count = Min(L, n - begin);
    const float* group = scores + begin;
    if (count < L) {
      for (int64_t i = 0; i < L; ++i) padded[i] = i < count ? group[i] : -__builtin_inff();
      group = padded;
    }
    if (!AnyReaches(group, MostNoise(0), best.value)) continue;
    NoiseWords(key, begin / L, words);
    uint32_t least = words[0];  // has the greatest noise
    for (int64_t i = 1; i < L; ++i) least = Min(least, words[i]);
    if (!AnyReaches(group, MostNoise(least), best.value)) continue;
    for (int64_t i = 0; i < L; ++i) sums[i] = group[i] + Gumbel(words[i]);
    for (int64_t i = 0; i < count; ++i)
      if (sums[i] > best.value || (sums[i] == best.value && begin + i < best.index)) best = {sums[i], begin + i, false};
  }
  return best.index;
}

void DivideAll(const float* x, int64_t n, float divisor, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] / divisor;
}

void ExpFrom(const float* x, int64_t n, float maximum, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = Exp(x[i] - maximum);
}

int64_t MassFrom(const float* x, int64_t n, float maximum) {
  constexpr int64_t kRun = 256;
  float powers[kRun];
  int64_t total = 0;
  for (int64_t begin = 0; begin < n; begin += kRun) {
    const int64_t count = Min(kRun, n - begin);
    ExpFrom(x + begin, count, maximum, powers);
    for (int64_t i = 0; i < count; ++i) total += static_cast<int64_t>(powers[i] * kMassOne);
  }
  return total;
}

template <class T>
constexpr Kernels Table() {
  return {.element_size = sizeof(T),
          .exp = ExpAll,
          .log = LogAll,
          .silu = SiluAll,
          .gelu = GeluAll,
          .tanh = TanhAll,
          .inverse_sqrt = InverseSqrtAll,
          .widen = Widen<T>,
          .narrow = Narrow<T>,
          .pack = Pack<T>,
          .copy_row = CopyRow<T>,
          .embed = Embed<T>,
          .rms_norm = RmsNorm<T>,
          .linear = Linear<T>,
          .finish = Finish<T>,
          .add_residual = AddResidual<T>,
          .silu_mul = SiluMul<T>,
          .gelu_mul = GeluMul<T>,
          .multiply = Multiply<T>,
          .scale_logits = ScaleLogits,
          .rope = Rope<T>,
          .append = Append<T>,
          .attend_chunk = AttendChunk<T>,
          .merge_chunks = MergeChunks<T>,
          .argmax = Argmax,
          .gumbel = GumbelAll,
          .gumbel_argmax = GumbelArgmax,
          .divide = DivideAll,
          .exp_from = ExpFrom,
          .mass_from = MassFrom};
}

#if defined(LAYERSKIP_AVX512_BF16)
constexpr Kernels kTables[] = {Table<BFloat16>()};  // the others gain nothing
#else
constexpr Kernels kTables[kNumDtypes] = {Table<BFloat16>(), Table<Float16>(), Table<float>()};
#endif

}  // namespace
}  // namespace layerskip
