// The CPU kernels as a table of functions: one table per (instruction set, dtype), filled by kernels.inl.
//
// Torch-free and single-threaded: layers.cpp decides which thread calls what. Activations are fp32 buffers that
// hold values of the model's dtype; `const void*` is data in that dtype. Linear weights are packed
// [ceil(N / 16)][K][16] by `pack_weight`; in bf16, inputs 2 i and 2 i + 1 of a column share a 32-bit word. Quantised
// weights are blocks.h's.
#pragma once

#include <cstdint>

#include "blocks.h"
#include "contract.h"
#include "random.h"

namespace layerskip {

enum class Dtype { kBFloat16, kFloat16, kFloat32 };
inline constexpr int kNumDtypes = 3;

// What is added to the mean of the squares, and to the weight (Gemma's 1 + w).
struct NormConstants {
  float eps, offset;
};

inline constexpr float kMassOne = 0x1p40f;  // the likeliest token's probability, in the integers that are summed

struct Maximum {
  float value;
  int64_t index;
  bool has_nan;
};

// One sequence's pages of one layer.
struct PageView {
  const void* k;         // [P, G, K, S]
  const void* v;         // [P, G, S, K]
  const int32_t* table;  // page of each block of S positions
  int64_t kv_heads, head_dim, page_size;
};

// Attention of some rows of one sequence, the query heads of one KV head, over one chunk of positions.
struct ChunkTask {
  PageView pages;
  int64_t kv_head, chunk;
  const int32_t* rows;  // [num_rows] indices into q, positions and partials
  int64_t num_rows, num_heads;
  const float* q;            // [T, H, K]
  const int64_t* positions;  // [T]
  float scale, cap;          // of the scores; a cap of 0 is none
  int64_t window;            // positions that a row sees, itself the last of them; 0: all
  float* partials;           // [T, H, max_chunks, 2 + K]: m, l, o
  int64_t max_chunks;        // chunks per (row, head) in partials
  const ChunkTask* next;     // what the same thread does after this one; null: nothing
};

struct Kernels {
  int64_t element_size;
  // Rules 5 and 2, elementwise on fp32; in place is allowed.
  void (*exp)(const float* x, int64_t n, float* out);
  void (*log)(const float* x, int64_t n, float* out);
  void (*silu)(const float* x, int64_t n, float* out);
  void (*gelu)(const float* x, int64_t n, float* out);
  void (*tanh)(const float* x, int64_t n, float* out);
  void (*inverse_sqrt)(const float* x, int64_t n, float* out);
  void (*widen)(const void* from, int64_t n, float* to);
  void (*narrow)(const float* from, int64_t n, void* to);
  // Row-major [N, K] -> packed, groups group_begin .. group_end.
  void (*pack)(const void* weight, int64_t n, int64_t k, int64_t group_begin, int64_t group_end, void* packed);
  // Row `row` of a packed weight becomes row `to_row` of another.
  void (*copy_row)(const void* weight, int64_t row, int64_t k, int64_t to_row, void* packed);
  // Row `token` of a packed embedding [V, D].
  void (*embed)(const void* embedding, int64_t token, int64_t hidden_size, float* out);
  // Rule 2 on one row of n; in place is allowed.
  void (*rms_norm)(const float* x, const void* weight, int64_t n, NormConstants constants, float* out);
  // Rule 1 on rows [T, K], for columns 16 * group_begin .. min(16 * group_end, n) of out [T, n].
  void (*linear)(const float* x, int64_t rows, int64_t k, const void* weight, const void* bias, int64_t n,
                 int64_t group_begin, int64_t group_end, bool round, float* out);
  // What rules 1 and 8 have in common, on the same columns: the bias (null: none), and to_dtype if `round`.
  void (*finish)(const void* bias, int64_t rows, int64_t n, int64_t group_begin, int64_t group_end, bool round,
                 float* out);
  // y = to_dtype(residual + y), gate = to_dtype(to_dtype(silu(gate)) * up), the same with gelu, and
  // x = to_dtype(x * factor): n values in place.
  void (*add_residual)(const float* residual, int64_t n, float* y);
  void (*silu_mul)(const float* up, int64_t n, float* gate);
  void (*gelu_mul)(const float* up, int64_t n, float* gate);
  void (*multiply)(float factor, int64_t n, float* x);
  // x = x * factor, then cap * tanh(x / cap) unless cap is 0: n values in place, in fp32.
  void (*scale_logits)(float factor, float cap, int64_t n, float* x);
  // Rule 3 on the first rotary_dim values of one head, in place; cos and sin hold rotary_dim / 2.
  void (*rope)(const float* cos, const float* sin, int64_t rotary_dim, float* head);
  // One position's k and v of all KV heads ([G, K] each) into slot = page * S + offset of a layer's pages.
  void (*append)(const float* k, const float* v, int64_t slot, int64_t kv_heads, int64_t head_dim, int64_t page_size,
                 void* k_pages, void* v_pages);
  // Rule 4: the chunks' partial results, then their merge into one head's output of head_dim values.
  void (*attend_chunk)(const ChunkTask& task);
  void (*merge_chunks)(float* partials, int64_t num_chunks, int64_t head_dim, float* out);
  // Rule 6 over n values.
  Maximum (*argmax)(const float* x, int64_t n);
  // Rule 7: words to Gumbel noise; the argmax of all token ids' scores plus their noise, `likeliest` being that of the
  // scores alone; x / divisor; exp(x - maximum).
  void (*gumbel)(const uint32_t* words, int64_t n, float* out);
  int64_t (*gumbel_argmax)(const float* scores, int64_t n, const NoiseKey& key, int64_t likeliest);
  void (*divide)(const float* x, int64_t n, float divisor, float* out);
  void (*exp_from)(const float* x, int64_t n, float maximum, float* out);
  // The sum of exp(x - maximum) * kMassOne, each truncated to an integer: parts of a row may be added in any order.
  int64_t (*mass_from)(const float* x, int64_t n, float maximum);
};

enum class InstructionSet { kPortable, kAvx2, kAvxVnni, kAvx512, kAvx512Vnni, kAvx512Bf16 };
inline constexpr int kNumInstructionSets = 6;

const char* InstructionSetName(InstructionSet set);
bool IsSupported(InstructionSet set);
// The best supported set, unless SetInstructionSet or the environment's LAYERSKIP_ISA chose another.
InstructionSet CurrentInstructionSet();
void SetInstructionSet(InstructionSet set);  // throws std::invalid_argument when this machine lacks it
const Kernels& KernelsFor(Dtype dtype);
const BlockKernels& CurrentBlockKernels();

}  // namespace layerskip
