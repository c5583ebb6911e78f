// The bodies of kernels.h, compiled once per instruction set: see isa_*.cpp. Each reads like its line in
// layerskip_kernels/reference.py; what differs is only which lanes run beside each other.

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

LAYERSKIP_FN float InverseSqrt(float x) { return 1.0f / __builtin_sqrtf(x); }

void InverseSqrtAll(const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = InverseSqrt(x[i]);
}

// ---- rule 1 ----

// Where row n of a weight stands among the 16 of its group: bf16 keeps rows n and n + 8 in one 32-bit word.
template <class T>
LAYERSKIP_FN int64_t PackedLane(int64_t n) {
  return std::is_same_v<T, BFloat16> ? (n < 8 ? 2 * n : 2 * (n - 8) + 1) : n;
}

// Elements of W in one packed group of K inputs.
template <class W>
LAYERSKIP_FN int64_t GroupSize(int64_t k) {
  return (std::is_same_v<W, int8_t> ? k + kScaleRows : k) * kGroup;
}

// Row-major row -> its lane of a packed group; no row: zeros.
template <class W>
void PackRow(const W* from, int64_t k, int64_t lane, W* group) {
  for (int64_t i = 0; i < k; ++i) group[i * kGroup + PackedLane<W>(lane)] = from == nullptr ? W{} : from[i];
  if constexpr (std::is_same_v<W, int8_t>) {
    constexpr int64_t kSize = sizeof(float);
    for (int64_t s = 0; s < kSegments; ++s)
      for (int64_t byte = 0; byte < kSize; ++byte)
        group[(k + s * kSize) * kGroup + lane * kSize + byte] = from == nullptr ? W{} : from[k + s * kSize + byte];
  }
}

template <class W>
void PackGroups(const void* weight, int64_t n, int64_t k, int64_t group_begin, int64_t group_end, void* packed) {
  const W* from = static_cast<const W*>(weight);
  const int64_t row_size = GroupSize<W>(k) / kGroup;
  for (int64_t group = group_begin; group < group_end; ++group) {
    for (int64_t lane = 0; lane < kGroup; ++lane) {
      const int64_t row = group * kGroup + lane;
      PackRow<W>(row < n ? from + row * row_size : nullptr, k, lane, static_cast<W*>(packed) + group * GroupSize<W>(k));
    }
  }
}

template <class T>
void Pack(WeightView weight, int64_t n, int64_t k, int64_t group_begin, int64_t group_end, void* packed) {
  if (weight.is_int8) {
    PackGroups<int8_t>(weight.data, n, k, group_begin, group_end, packed);
  } else {
    PackGroups<T>(weight.data, n, k, group_begin, group_end, packed);
  }
}

template <class W>
void CopyRowOf(const void* weight, int64_t row, int64_t k, int64_t to_row, void* packed) {
  const W* from = static_cast<const W*>(weight) + (row / kGroup) * GroupSize<W>(k);
  W* to = static_cast<W*>(packed) + (to_row / kGroup) * GroupSize<W>(k);
  const int64_t lane = row % kGroup, to_lane = to_row % kGroup;
  for (int64_t i = 0; i < k; ++i) to[i * kGroup + PackedLane<W>(to_lane)] = from[i * kGroup + PackedLane<W>(lane)];
  if constexpr (std::is_same_v<W, int8_t>) {
    constexpr int64_t kSize = sizeof(float);
    for (int64_t s = 0; s < kSegments; ++s)
      for (int64_t byte = 0; byte < kSize; ++byte)
        to[(k + s * kSize) * kGroup + to_lane * kSize + byte] = from[(k + s * kSize) * kGroup + lane * kSize + byte];
  }
}

template <class T>
void CopyRow(WeightView weight, int64_t row, int64_t k, int64_t to_row, void* packed) {
  if (weight.is_int8) {
    CopyRowOf<int8_t>(weight.data, row, k, to_row, packed);
  } else {
    CopyRowOf<T>(weight.data, row, k, to_row, packed);
  }
}

template <class T>
void Embed(const void* embedding, int64_t token, int64_t hidden_size, float* out) {
  const T* group = static_cast<const T*>(embedding) + (token / kGroup) * hidden_size * kGroup;
  const int64_t lane = PackedLane<T>(token % kGroup);
  for (int64_t d = 0; d < hidden_size; ++d) out[d] = ToFloat(group[d * kGroup + lane]);
}

// What one pass over the weights holds in registers: rows x groups accumulators of 16 lanes.
#if defined(LAYERSKIP_AVX512)
constexpr int kRowsPerPass = 6;
constexpr int GroupsPerPass(int64_t) { return 4; }
#elif defined(LAYERSKIP_AVX2)
constexpr int kRowsPerPass = 6;
constexpr int GroupsPerPass(int64_t rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
#else
constexpr int kRowsPerPass = 2;
constexpr int GroupsPerPass(int64_t) { return 1; }
#endif

// How far ahead of the arithmetic weights are fetched: with several rows a pass over them is slow enough for the
// processor's own prefetching to fall behind (docs/log.md).
constexpr int64_t kPrefetchBytes = 2048;

// T: dtype of x; W: of the weights, T or int8. An int8 product with a 16-bit number is exact in fp32, too.
template <class T, class W, int kRows, int kGroups>
void DotTile(const float* x, int64_t k, const W* weight, F32x16 (&out)[kRows][kGroups]) {
  const int64_t length = (k + kSegments - 1) / kSegments;
  F32x16 partial[kSegments][kRows][kGroups];
  for (int s = 0; s < kSegments; ++s) {
    const int64_t begin = Min(s * length, k), end = Min(begin + length, k);
    F32x16 acc[kRows][kGroups];
    for (int r = 0; r < kRows; ++r)
      for (int g = 0; g < kGroups; ++g) acc[r][g] = Zero();
    for (int64_t i = begin; i < end; ++i) {
      F32x16 w[kGroups];
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) {
        const W* w_gi = weight + g * GroupSize<W>(k) + i * kGroup;
        __builtin_prefetch(reinterpret_cast<const char*>(w_gi) + kPrefetchBytes);
        w[g] = LoadPacked(w_gi);
      }
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const F32x16 x_ri = Broadcast(x[r * k + i]);
#pragma GCC unroll 4
        for (int g = 0; g < kGroups; ++g) acc[r][g] = MulAdd<T>(x_ri, w[g], acc[r][g]);
      }
    }
    for (int g = 0; g < kGroups; ++g) {
      if constexpr (std::is_same_v<W, int8_t>) {
        const W* scales = weight + g * GroupSize<W>(k) + k * kGroup + s * kGroup * sizeof(float);
        const F32x16 scale = Load(reinterpret_cast<const float*>(scales));
        for (int r = 0; r < kRows; ++r) acc[r][g] = Mul(acc[r][g], scale);
      }
      for (int r = 0; r < kRows; ++r) partial[s][r][g] = acc[r][g];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int g = 0; g < kGroups; ++g) {
      const auto p = [&](int s) { return partial[s][r][g]; };
      out[r][g] = Add(Add(Add(p(0), p(1)), Add(p(2), p(3))), Add(Add(p(4), p(5)), Add(p(6), p(7))));
    }
  }
}

template <class T, class W, int kRows, int kGroups>
void LinearTile(const float* x, int64_t k, const W* weight, const T* bias, int64_t n, int64_t group, bool round,
                float* out) {
  F32x16 y[kRows][kGroups];
  DotTile<T, W, kRows, kGroups>(x, k, weight + group * GroupSize<W>(k), y);
  for (int g = 0; g < kGroups; ++g) {
    const int64_t column = (group + g) * kGroup, columns = Min(kGroup, n - column);
    for (int r = 0; r < kRows; ++r) {
      F32x16 value = y[r][g];
      if (bias != nullptr) value = Add(value, LoadFirst(bias + column, columns));
      if (round) value = RoundLanes<T>(value);
      if (columns == kGroup) {
        Store(out + r * n + column, value);
      } else {
        StoreFirst(out + r * n + column, value, columns);
      }
    }
  }
}

template <class T, class W>
void LinearOf(const float* x, int64_t rows, int64_t k, const void* weight, const void* bias, int64_t n,
              int64_t group_begin, int64_t group_end, bool round, float* out) {
  const int64_t groups_at_once = GroupsPerPass(Min(rows, kRowsPerPass));
  for (int64_t group = group_begin; group < group_end;) {
    const int64_t groups = Min(groups_at_once, group_end - group);
    for (int64_t row = 0; row < rows; row += kRowsPerPass) {
      const int64_t rows_now = Min(kRowsPerPass, rows - row);
      WithConstant<kRowsPerPass>(rows_now, [&](auto r) {
        constexpr int kRows = decltype(r)::value;
        WithConstant<GroupsPerPass(kRows)>(groups, [&](auto g) {
          constexpr int kGroups = decltype(g)::value;
          LinearTile<T, W, kRows, kGroups>(x + row * k, k, static_cast<const W*>(weight), static_cast<const T*>(bias),
                                           n, group, round, out + row * n);
        });
      });
    }
    group += groups;
  }
}

template <class T>
void Linear(const float* x, int64_t rows, int64_t k, WeightView weight, const void* bias, int64_t n,
            int64_t group_begin, int64_t group_end, bool round, float* out) {
  if (weight.is_int8) {
    LinearOf<T, int8_t>(x, rows, k, weight.data, bias, n, group_begin, group_end, round, out);
  } else {
    LinearOf<T, T>(x, rows, k, weight.data, bias, n, group_begin, group_end, round, out);
  }
}

// ---- rule 2 ----

template <class T>
void RmsNorm(const float* x, const void* weight, int64_t n, float eps, float* out) {
  float lanes[kNormLanes] = {};
  for (int64_t start = 0; start < n; start += kNormLanes) {
    const int64_t count = Min(kNormLanes, n - start);
    for (int64_t i = 0; i < count; ++i) lanes[i] += x[start + i] * x[start + i];
  }
  for (int width = kNormLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = lanes[2 * i] + lanes[2 * i + 1];
  const float mean = lanes[0] / static_cast<float>(n);
  const float inv = InverseSqrt(mean + eps);
  const T* w = static_cast<const T*>(weight);
  for (int64_t i = 0; i < n; ++i) out[i] = Round<T>(Round<T>(x[i] * inv) * ToFloat(w[i]));
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

// ---- rule 3 ----

template <class T>
void Rope(const float* cos, const float* sin, int64_t head_dim, float* head) {
  const int64_t half = head_dim / 2;
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

constexpr int kPairs = 6;       // (row, query head) pairs whose scores are folded side by side
constexpr int kValuePairs = 3;  // the same for the weighted sum of values

// What fits into registers beside that: 16-position tiles of keys, and 16-dimension groups of values.
#if defined(LAYERSKIP_AVX512)
constexpr int TilesAtOnce(int) { return 4; }
constexpr int kValueGroups = 4;
#elif defined(LAYERSKIP_AVX2)
constexpr int TilesAtOnce(int pairs) { return pairs == 1 ? 4 : pairs == 2 ? 3 : pairs == 3 ? 2 : 1; }
constexpr int kValueGroups = 1;
#else
constexpr int TilesAtOnce(int) { return 1; }
constexpr int kValueGroups = 1;
#endif

// The pairs of one block and what rule 4 keeps for each.
struct PairBlock {
  const float* q[kPairs];
  float* partial[kPairs];   // m, l, o[head_dim]
  int64_t visible[kPairs];  // positions of this chunk that the pair may see
  int64_t count, most_visible;
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

// Keys of up to 16 positions of a chunk, and where their scores go.
template <class T>
struct KeyTile {
  const T* k;
  int64_t at, lanes;
};

template <class T, int kCount, int kTiles, bool kWhole>
void ScoreTiles(PairBlock& block, const KeyTile<T>* tiles, const PageView& pages, float scale) {
  F32x16 acc[kCount][kTiles];
  for (int p = 0; p < kCount; ++p)
    for (int t = 0; t < kTiles; ++t) acc[p][t] = Zero();
  for (int64_t d = 0; d < pages.head_dim; ++d) {
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
void Scores(const ChunkTask& task, PairBlock& block) {
  KeyTile<T> tiles[kChunk];
  int64_t count = 0;
  for (int64_t done = 0; done < block.most_visible;) {
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
        ScoreTiles<T, kCount, 1, false>(block, tiles + first, task.pages, task.scale);
      } else {
        WithConstant<TilesAtOnce(kCount)>(whole, [&](auto t) {
          ScoreTiles<T, kCount, decltype(t)::value, true>(block, tiles + first, task.pages, task.scale);
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

// scores -> p = to_dtype(exp(s - m)) in place; m into the partial results.
template <class T>
void Softmax(PairBlock& block) {
  for (int64_t p = 0; p < block.count; ++p) {
    float* s = block.scores[p];
    const float m = Largest(s, block.visible[p]);
    for (int64_t j = 0; j < block.visible[p]; ++j) s[j] = Round<T>(Exp(s[j] - m));
    block.partial[p][0] = m;
  }
}

// Folds `count` positions from v on, `at` in the chunk, into o[d .. d + 16 * kGroups] of kCount pairs, and with
// kSum into l. Unless kWhole, the head ends within the only group.
template <class T, int kCount, int kGroups, bool kWhole, bool kSum>
void FoldValues(PairBlock& block, int64_t first, const T* v, int64_t head_dim, int64_t at, int64_t count, int64_t d) {
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
    F32x16 v_j[kGroups];
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
      const T* v_jd = v + j * head_dim + d + g * kLanes;
      v_j[g] = kWhole ? Load(v_jd) : LoadFirst(v_jd, lanes);
    }
#pragma GCC unroll 3
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
void FoldRun(PairBlock& block, int64_t first, const T* v, int64_t head_dim, int64_t at, int64_t count, int64_t d = 0) {
  if (d >= head_dim) return;
  const int64_t groups = Min(kValueGroups, (head_dim - d) / kLanes);
  if (groups == 0) return FoldValues<T, kCount, 1, false, kSum>(block, first, v, head_dim, at, count, d);
  WithConstant<kValueGroups>(groups, [&](auto g) {
    FoldValues<T, kCount, decltype(g)::value, true, kSum>(block, first, v, head_dim, at, count, d);
  });
  FoldRun<T, kCount, false>(block, first, v, head_dim, at, count, d + groups * kLanes);
}

// l = fold of p_j, o = fold of p_j * v_j: pairs side by side as far as all of them see, then each to its own end.
template <class T>
void WeightedValues(const ChunkTask& task, PairBlock& block) {
  const int64_t head_dim = task.pages.head_dim;
  for (int64_t p = 0; p < block.count; ++p)
    for (int64_t i = 0; i < 1 + head_dim; ++i) block.partial[p][1 + i] = 0.0f;
  for (int64_t first = 0; first < block.count; first += kValuePairs) {
    const int64_t count = Min(kValuePairs, block.count - first);
    int64_t shared = kChunk, most = 0;
    for (int64_t p = first; p < first + count; ++p) {
      shared = Min(shared, block.visible[p]);
      most = Max(most, block.visible[p]);
    }
    for (int64_t done = 0; done < most;) {
      const Run<T> run = RunAt<T>(task.pages, task.kv_head, task.chunk * kChunk + done, most - done);
      const int64_t together = Max(0, Min(run.positions, shared - done));
      if (together > 0) {
        WithConstant<kValuePairs>(
            count, [&](auto c) { FoldRun<T, decltype(c)::value>(block, first, run.v, head_dim, done, together); });
      }
      for (int64_t p = first; p < first + count; ++p) {
        const int64_t alone = Min(run.positions, block.visible[p] - done) - together;
        if (alone > 0) FoldRun<T, 1>(block, p, run.v + together * head_dim, head_dim, done + together, alone);
      }
      done += run.positions;
    }
  }
}

template <class T>
void AttendChunk(const ChunkTask& task) {
  const int64_t head_dim = task.pages.head_dim, heads_per_kv = task.num_heads / task.pages.kv_heads;
  PairBlock block;
  block.count = block.most_visible = 0;
  const auto finish = [&] {
    if (block.count == 0) return;
    Scores<T>(task, block);
    Softmax<T>(block);
    WeightedValues<T>(task, block);
    block.count = block.most_visible = 0;
  };
  for (int64_t r = 0; r < task.num_rows; ++r) {
    const int64_t row = task.rows[r];
    const int64_t visible = Min(kChunk, task.positions[row] + 1 - task.chunk * kChunk);
    if (visible <= 0) continue;
    for (int64_t h = 0; h < heads_per_kv; ++h) {
      const int64_t head = row * task.num_heads + task.kv_head * heads_per_kv + h;
      block.q[block.count] = task.q + head * head_dim;
      block.partial[block.count] = task.partials + (head * task.max_chunks + task.chunk) * (2 + head_dim);
      block.visible[block.count] = visible;
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

Maximum Argmax(const float* x, int64_t n) {
  Maximum best{x[0], 0, x[0] != x[0]};
  for (int64_t i = 0; i < n; ++i) {
    best.has_nan |= x[i] != x[i];
    if (x[i] > best.value) {
      best.value = x[i];
      best.index = i;
    }
  }
  return best;
}

// ---- rule 7 ----

constexpr int64_t kNoiseBlocks = 16, kNoiseIds = 4 * kNoiseBlocks;  // counters, and the token ids they serve

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

// Where scores are -inf, noise would change nothing and is not made.
void AddGumbel(const float* scores, int64_t n, const NoiseKey& key, float* out) {
  constexpr float kNever = -__builtin_inff();
  uint32_t words[kNoiseIds];
  float noise[kNoiseIds];
  for (int64_t begin = 0; begin < n; begin += kNoiseIds) {
    const int64_t count = Min(kNoiseIds, n - begin);
    bool any = false;
    for (int64_t i = 0; i < count; ++i) any |= scores[begin + i] != kNever;
    if (any) {
      NoiseWords(key, begin / kNoiseIds, words);
      GumbelAll(words, kNoiseIds, noise);
    }
    for (int64_t i = 0; i < count; ++i) out[begin + i] = any ? scores[begin + i] + noise[i] : kNever;
  }
}

void DivideAll(const float* x, int64_t n, float divisor, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] / divisor;
}

void ExpFrom(const float* x, int64_t n, float maximum, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = Exp(x[i] - maximum);
}

template <class T>
constexpr Kernels Table() {
  return {sizeof(T),      ExpAll,         LogAll,     SiluAll,   InverseSqrtAll, Widen<T>,   Narrow<T>, Pack<T>,
          CopyRow<T>,     Embed<T>,       RmsNorm<T>, Linear<T>, AddResidual<T>, SiluMul<T>, Rope<T>,   Append<T>,
          AttendChunk<T>, MergeChunks<T>, Argmax,     GumbelAll, AddGumbel,      DivideAll,  ExpFrom};
}

constexpr Kernels kTables[kNumDtypes] = {Table<BFloat16>(), Table<Float16>(), Table<float>()};

}  // namespace
}  // namespace layerskip
