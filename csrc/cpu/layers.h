// The fused ops as phases of one parallel region, and the one move made of them. Torch-free.
//
// Every function here is called by all threads of a team with equal arguments; buffers are shared, and its results
// are visible to the whole team when it returns.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace layerskip {

struct Shape {
  int64_t hidden_size, intermediate_size, num_heads, kv_heads, head_dim;
  int64_t q_size() const { return num_heads * head_dim; }
  int64_t kv_size() const { return kv_heads * head_dim; }
};

// Pointers into tensors that the caller keeps alive; biases are null where there is none.
struct LayerWeights {
  const void* attn_norm;
  WeightView wq, wk, wv;
  const void* qkv_bias;
  WeightView wo;
  const void *out_bias, *mlp_norm;
  WeightView w_gate, w_up, w_down;
};

struct ModelView {
  Dtype dtype;
  const Kernels* kernels;
  Shape shape;
  int64_t vocab_size;
  float eps, scale;
  const void *embedding, *final_norm;
  WeightView lm_head;
  int64_t max_positions;
  const float *cos, *sin;  // [max_positions, K / 2]
  std::vector<LayerWeights> layers;
};

struct CacheView {
  char *k, *v;   // [L, P, G, K, S] and [L, P, G, S, K]
  char* hidden;  // [P, S, D]
  int64_t num_pages, page_size;
  int64_t layer_bytes;         // of one layer of k or of v
  const int32_t* block_table;  // [B, max_blocks]
  int64_t max_blocks;
};

// The rows of a move, in the order in which they join it: by depth, then as given.
struct Rows {
  std::vector<int64_t> tokens, positions, slots, given;  // given: index before sorting
  std::vector<int32_t> sequences, depths;
  int64_t size() const { return static_cast<int64_t>(tokens.size()); }
};

// fp32 scratch for a number of rows; it is not cleared.
class Buffer {
 public:
  explicit Buffer(int64_t n) : data_(new float[n > 0 ? n : 1]) {}
  operator float*() { return data_.get(); }
  operator const float*() const { return data_.get(); }

 private:
  std::unique_ptr<float[]> data_;
};

struct Workspace {
  Workspace(const Shape& shape, int64_t rows, int64_t last_position);
  int64_t max_chunks;
  Buffer hidden, normed, q, k, v, partials, attention, projected, gate, up;
};

// Attention of some rows, cut into tasks: a few rows of one sequence and one chunk of its positions each.
struct AttentionPlan {
  AttentionPlan(const int32_t* sequences, const int64_t* positions, int64_t count, int64_t num_sequences);
  struct Task {
    int32_t sequence;
    int64_t first, count;  // rows[first .. first + count]
    int64_t chunk;
  };
  std::vector<int32_t> rows;  // sequence by sequence
  std::vector<Task> tasks;
  int64_t max_chunks;  // of any row
};

void NormQkvRopeAppend(Team& team, const Kernels& kernels, const Shape& shape, const LayerWeights& w, float eps,
                       const float* cos, const float* sin, int64_t rows, const int64_t* positions, const int64_t* slots,
                       void* k_pages, void* v_pages, int64_t page_size, Workspace& ws);

void PagedAttention(Team& team, const Kernels& kernels, const Shape& shape, int64_t rows, const int64_t* positions,
                    const AttentionPlan& plan, const void* k_pages, const void* v_pages, int64_t page_size,
                    const int32_t* block_table, int64_t max_blocks, float scale, Workspace& ws);

// x = to_dtype(x + to_dtype(input . weight + bias)) for x [rows, D]; `projected` is scratch of the same size.
void LinearResidual(Team& team, const Kernels& kernels, int64_t rows, const float* input, int64_t input_size,
                    WeightView weight, const void* bias, int64_t output_size, float* projected, float* x);

void NormGateUpSilu(Team& team, const Kernels& kernels, const Shape& shape, const void* norm, WeightView w_gate,
                    WeightView w_up, float eps, int64_t rows, Workspace& ws);

// What the head makes of some rows: tokens [rows], logits [rows, V], and whether any logit is NaN.
struct Head {
  Head(const void* norm, WeightView weight, int64_t hidden_size, int64_t vocab_size, float eps, int64_t rows,
       float* logits);
  void Run(Team& team, const Kernels& kernels, const float* hidden);

  std::vector<int64_t> tokens;
  std::atomic<bool> has_nan{false};

 private:
  const void* norm_;
  WeightView weight_;
  int64_t hidden_size_, vocab_size_;
  float eps_;
  float* logits_;
  Buffer normed_;
  std::vector<Maximum> maxima_;  // [threads][rows]; index -1: nothing yet
};

// The one move: raises rows (sorted by depth) to layer `stop`; their hidden states end in ws.hidden and, for
// whoever comes next, in the cache.
class Move {
 public:
  Move(const ModelView& model, const CacheView& cache, Rows rows, int64_t num_sequences, int64_t stop);
  void Run(Team& team);
  Rows& rows() { return rows_; }
  const float* hidden() const { return ws_.hidden; }  // [T, D], in the order of rows()

 private:
  struct Stage {  // layers first..last run on the first `count` rows
    int64_t first, last, count;
    AttentionPlan attention;
  };

  const ModelView& model_;
  const CacheView& cache_;
  Rows rows_;
  std::vector<Stage> stages_;
  Workspace ws_;
};

}  // namespace layerskip
