// The fused ops as phases of one parallel region, and the one move made of them. Torch-free.
//
// Every function here is called by all threads of a team with equal arguments; buffers are shared, and its results
// are visible to the whole team when it returns.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "linear.h"
#include "parallel.h"

namespace layerskip {

// Sizes of a model's layers; an op that needs only some of them leaves the others 0.
struct LayerSizes {
  int64_t hidden_size, intermediate_size, num_heads, kv_heads, head_dim;
  NormConstants norm = {};
  int64_t q_size() const { return num_heads * head_dim; }
  int64_t kv_size() const { return kv_heads * head_dim; }
};

// Pointers into tensors that the caller keeps alive, null where the model has none. A norm stands before what it is
// named after, a post_norm between that and the residual sum.
struct LayerWeights {
  bool attends;  // false: no attention, K or V, only an MLP
  const void* attn_norm;
  WeightView wq, wk, wv;
  const void* qkv_bias;
  WeightView wo;
  const void *out_bias, *mlp_norm;
  WeightView w_gate, w_up, w_down;
  const void *q_norm, *k_norm;
  bool norms_heads;  // whether q_norm and k_norm norm each head by itself, or all as one
  const void *attn_post_norm, *mlp_post_norm, *gate_up_bias, *down_bias;
};

// cos and sin, fp32 [max_positions, rotary_dim / 2]; null where nothing is rotated.
struct RopeTables {
  const float *cos, *sin;
  int64_t rotary_dim;
};

// What sets a layer apart from the others: RopeTables, and which of ModelView.windows it has.
struct LayerKind {
  RopeTables rope;
  int64_t window_index;
};

// What is done to attention scores: a cap of 0 and a window of 0 are none.
struct ScoreRules {
  float scale, cap = 0.0f;
  int64_t window = 0;
};

// What is done to logits; a cap of 0 is none.
struct LogitRules {
  NormConstants norm;
  float multiplier = 1.0f, cap = 0.0f;
};

struct ModelView {
  Dtype dtype;
  LayerSizes sizes;
  int64_t vocab_size;
  float scale, score_cap, embedding_multiplier, residual_multiplier;
  bool gelu;
  LogitRules logits;
  WeightView embedding;
  const void* final_norm;
  WeightView lm_head;
  int64_t max_positions;
  int64_t num_cached;  // layers that need pages: up to the last one with attention
  std::vector<LayerWeights> layers;
  std::vector<LayerKind> kinds;  // of the layers
  std::vector<int64_t> windows;  // all that layers have
  IntegerSizes integers;         // of the layers
  int64_t num_layers() const { return static_cast<int64_t>(layers.size()); }
  const Kernels& kernels() const { return KernelsFor(dtype); }
};

struct CacheView {
  char *k, *v;   // [L, P, G, K, S] and [L, P, G, S, K]
  char* hidden;  // [P, S, D]
  int64_t num_pages, page_size;
  int64_t layer_bytes;         // of one layer of k or of v
  const int32_t* block_table;  // [B, max_blocks]
  int64_t max_blocks;
};

// One layer's pages, k [P, G, K, S] and v [P, G, S, K].
struct LayerPages {
  void *k, *v;
  int64_t page_size;
};

// The pages of each sequence.
struct BlockTable {
  const int32_t* pages;  // [B, max_blocks]
  int64_t max_blocks;
};

// Where rows stand in their sequences and in the pages: positions [count], slots [count] (-1: K and V are not kept).
struct RowSlots {
  int64_t count;
  const int64_t *positions, *slots;
};

// The rows of a move, in the order in which they join it: by depth, then as given.
struct SortedRows {
  std::vector<int64_t> tokens, positions, slots, given;  // given: index before sorting
  std::vector<int32_t> sequences, depths;
  int64_t size() const { return static_cast<int64_t>(tokens.size()); }
  SortedRows First(int64_t count) const;
};

// Row `token` of a packed embedding [V, D], in the model's dtype.
void Embed(const Kernels& kernels, WeightView embedding, int64_t token, int64_t hidden_size, float* out);

struct Workspace {
  Workspace(const LayerSizes& sizes, int64_t rows, int64_t last_position, const IntegerSizes& integer_sizes = {});
  int64_t max_chunks;
  Buffer hidden, q, k, v, partials, attention, projected, gate, up;
  PreparedRows normed;
  IntegerBuffer integers;
};

// Attention of some rows, cut into tasks: a few rows of one sequence and one chunk of its positions each, of those that
// the rows see with a window (0: none).
struct AttentionTasks {
  AttentionTasks(const int32_t* sequences, const int64_t* positions, int64_t count, int64_t num_sequences,
                 int64_t window);
  struct Task {
    int32_t sequence;
    int64_t first, count;  // rows[first .. first + count]
    int64_t chunk;
  };
  std::vector<int32_t> rows;  // sequence by sequence
  std::vector<Task> tasks;
  int64_t max_chunks;  // of any row
};

// ws.hidden -> ws.q, and K and V into their pages. Reads the attention part of `w`.
void NormQkvRopeAppend(Team& team, const Kernels& kernels, const LayerSizes& sizes, const LayerWeights& w,
                       const RopeTables& rope, const RowSlots& rows, const LayerPages& pages, Workspace& ws);

// ws.q -> ws.attention.
void PagedAttention(Team& team, const Kernels& kernels, const LayerSizes& sizes, const AttentionTasks& tasks,
                    const RowSlots& rows, const LayerPages& pages, const BlockTable& block_table,
                    const ScoreRules& rules, Workspace& ws);

// A linear layer: weight [outputs, inputs], bias [outputs] or null; what follows it where it ends in a residual sum.
struct LinearView {
  WeightView weight;
  const void* bias;
  int64_t inputs, outputs;
  const void* post_norm = nullptr;
  NormConstants norm = {};
  float multiplier = 1.0f;
};

// x = to_dtype(x + y) for x [rows, D] and y = to_dtype(input . weight + bias), normed and multiplied where the view
// says so; `projected` is scratch of the same size.
void LinearResidual(Team& team, const Kernels& kernels, int64_t rows, const float* input, const LinearView& linear,
                    const IntegerBuffer& integers, float* projected, float* x);

// ws.hidden -> ws.gate. Reads the MLP part of `w`.
void NormGateUpAct(Team& team, const Kernels& kernels, const LayerSizes& sizes, const LayerWeights& w, bool gelu,
                   int64_t rows, Workspace& ws);

// What the head makes of some rows: tokens [rows], logits [rows, V], and whether any logit is NaN.
struct Head {
  Head(const void* norm, WeightView weight, int64_t hidden_size, int64_t vocab_size, const LogitRules& rules,
       int64_t rows, float* logits);
  void Run(Team& team, const Kernels& kernels, const float* hidden);

  std::vector<int64_t> tokens;
  std::atomic<bool> has_nan{false};

 private:
  const void* norm_;
  WeightView weight_;
  int64_t hidden_size_, vocab_size_;
  LogitRules rules_;
  float* logits_;
  PreparedRows normed_;
  IntegerBuffer integers_;
  std::vector<Maximum> maxima_;  // [threads][rows]; index -1: nothing yet
};

// The one move: raises rows (sorted by depth) to layer `stop`; their hidden states end in ws.hidden and, for the
// moves that follow, in the cache.
class Move {
 public:
  // `keeps`: whether the cache gets the hidden states, too.
  Move(const ModelView& model, const CacheView& cache, SortedRows rows, int64_t num_sequences, int64_t stop,
       bool keeps = true);
  void Run(Team& team);
  SortedRows& rows() { return rows_; }
  const float* hidden() const { return ws_.hidden; }  // [T, D], in the order of rows()

 private:
  struct Stage {  // layers first..last run on the first `count` rows
    int64_t first, last, count;
    std::vector<AttentionTasks> attention;  // with each of the model's windows
  };

  const ModelView& model_;
  const CacheView& cache_;
  SortedRows rows_;
  std::vector<Stage> stages_;
  bool keeps_;
  Workspace ws_;
};

}  // namespace layerskip
