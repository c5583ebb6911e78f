// Checks at the edge of the ops: after them, no kernel reads or writes outside its tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <vector>

#include "kernels.h"

namespace layerskip {

inline constexpr int64_t kAny = std::numeric_limits<int64_t>::min();  // nothing that is computed from an argument
inline constexpr int64_t kMaxSize = std::numeric_limits<int32_t>::max();

// A number of heads, columns, tokens: before anything is divided by it, rounded up to groups or multiplied.
inline void CheckSize(const char* name, int64_t size) {
  TORCH_CHECK_VALUE(1 <= size && size <= kMaxSize, name, " must be in 1..", kMaxSize, ", got ", size);
}

inline void CheckNotEmpty(const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.numel() > 0, name, " must have no size of 0, got ", tensor.sizes());
}

inline void CheckTensor(const char* name, const at::Tensor& tensor, at::ScalarType dtype,
                        std::initializer_list<int64_t> sizes) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, name, " must be ", dtype, ", got ", tensor.scalar_type());
  bool equal = tensor.dim() == static_cast<int64_t>(sizes.size());
  const int64_t* size = sizes.begin();
  for (int64_t i = 0; equal && i < tensor.dim(); ++i) equal = size[i] == kAny || size[i] == tensor.size(i);
  if (!equal) {
    std::vector<int64_t> shown(sizes);
    std::replace(shown.begin(), shown.end(), kAny, int64_t{-1});
    TORCH_CHECK_VALUE(false, name, " must have the shape ", shown, " (-1: any), got ", tensor.sizes());
  }
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, " must be contiguous; call .contiguous() first");
}

// Of the dtype of a weight with scales of segments; kDense: another's.
inline WeightType SegmentType(at::ScalarType dtype) {
  return dtype == at::kChar ? WeightType::kInt8 : dtype == at::kShort ? WeightType::kInt15 : WeightType::kDense;
}

// A packed weight [N, K], in the model's dtype or quantised: with K in whole blocks int8 [groups, K + 32, 16] or int16
// [groups, K + 16, 16], or uint8 [groups, blocks, bytes], whose bytes tell the type.
inline WeightView CheckPacked(const char* name, const at::Tensor& weight, at::ScalarType dtype, int64_t n, int64_t k) {
  TORCH_CHECK_VALUE(1 <= n && n <= kMaxSize, name, " must have 1..", kMaxSize, " output columns, asked for ", n);
  const int64_t groups = (n + kGroup - 1) / kGroup;
  if (const WeightType type = SegmentType(weight.scalar_type()); type != WeightType::kDense) {
    const int64_t scales = kScaleBytes / weight.element_size();
    CheckTensor(name, weight, weight.scalar_type(), {groups, Blocks(k) * kBlock + scales, kGroup});
    return {weight.const_data_ptr(), type};
  }
  if (weight.scalar_type() == at::kByte) {
    const BlockLayout* layout = weight.dim() == 3 ? LayoutOfPackedBytes(weight.size(2)) : nullptr;
    TORCH_CHECK_VALUE(layout != nullptr, name, " is uint8 ", weight.sizes(),
                      ", which is no packed weight of a known type; use pack_weight");
    CheckTensor(name, weight, at::kByte, {groups, (k + layout->size - 1) / layout->size, kAny});
    return {weight.const_data_ptr(), layout->type};
  }
  CheckTensor(name, weight, dtype, {groups, k, kGroup});
  return {weight.const_data_ptr(), WeightType::kDense};
}

// An absent bias or norm is None for an op and an empty tensor in a step's list of weights.
inline const void* CheckOptional(const char* name, const std::optional<at::Tensor>& tensor, at::ScalarType dtype,
                                 int64_t n) {
  if (!tensor.has_value() || tensor->numel() == 0) return nullptr;
  CheckTensor(name, *tensor, dtype, {n});
  return tensor->const_data_ptr();
}

// Norms of q and k: of each head [head_dim], or of all heads as one; both, or neither.
struct QkNorms {
  const void *q, *k;
  bool heads;
};

inline QkNorms CheckQkNorms(const std::optional<at::Tensor>& q, const std::optional<at::Tensor>& k,
                            at::ScalarType dtype, int64_t q_size, int64_t kv_size, int64_t head_dim) {
  const bool heads = q.has_value() && q->numel() == head_dim;
  const void* q_norm = CheckOptional("q_norm", q, dtype, heads ? head_dim : q_size);
  const void* k_norm = CheckOptional("k_norm", k, dtype, heads ? head_dim : kv_size);
  TORCH_CHECK_VALUE((q_norm == nullptr) == (k_norm == nullptr), "q_norm and k_norm must be given together");
  return {q_norm, k_norm, heads};
}

inline void CheckRange(const char* name, const int64_t* values, int64_t count, int64_t low, int64_t high) {
  for (int64_t i = 0; i < count; ++i)
    TORCH_CHECK_VALUE(low <= values[i] && values[i] < high, name, "[", i, "] is ", values[i], ", expected ", low,
                      " <= value < ", high);
}

// query_start_loc int32 [B+1]: from 0 to `rows`, never falling.
inline void CheckStarts(const at::Tensor& query_start_loc, int64_t rows) {
  CheckTensor("query_start_loc", query_start_loc, at::kInt, {kAny});
  const int64_t count = query_start_loc.numel();
  TORCH_CHECK_VALUE(count >= 2, "query_start_loc must hold at least one sequence: [0, rows]");
  const int32_t* starts = query_start_loc.const_data_ptr<int32_t>();
  const bool valid = starts[0] == 0 && starts[count - 1] == rows && std::is_sorted(starts, starts + count);
  TORCH_CHECK_VALUE(valid, "query_start_loc must rise from 0 to the number of rows, ", rows);
}

// How the rows of each sequence are judged: its last drafts[b] rows are drafts; judged[b] is false for a sequence whose
// rows are only raised (a chunk of a prompt).
struct DraftCounts {
  const int64_t* drafts;
  const bool* judged;
  int64_t num_sequences;

  // The rows of a sequence that are judged: its drafts and the row before them.
  int64_t JudgedRows(int64_t b) const { return judged[b] ? drafts[b] + 1 : 0; }
};

inline DraftCounts CheckedDraftCounts(const at::Tensor& num_drafts, const at::Tensor& judged, const int32_t* starts,
                                      int64_t num_sequences) {
  CheckTensor("num_drafts", num_drafts, at::kLong, {num_sequences});
  CheckTensor("judged", judged, at::kBool, {num_sequences});
  const DraftCounts counts{num_drafts.const_data_ptr<int64_t>(), judged.const_data_ptr<bool>(), num_sequences};
  for (int64_t b = 0; b < num_sequences; ++b) {
    const int64_t rows = starts[b + 1] - starts[b], most = counts.judged[b] ? rows - 1 : 0;
    TORCH_CHECK_VALUE(0 <= counts.drafts[b] && counts.drafts[b] <= most, "num_drafts[", b, "] is ", counts.drafts[b],
                      ", expected 0..", most, " for a sequence of ", rows,
                      counts.judged[b] ? " rows" : " rows that is not judged");
  }
  return counts;
}

// The page of a position, guarded: a bad table entry is an error, never a stray write.
inline int64_t CheckedPage(const at::Tensor& block_table, int64_t sequence, int64_t position, int64_t page_size,
                           int64_t num_pages) {
  const int64_t block = position / page_size;
  TORCH_CHECK_VALUE(block < block_table.size(1), "block_table has ", block_table.size(1), " blocks of ", page_size,
                    " positions, but sequence ", sequence, " needs position ", position);
  const int64_t page = block_table.const_data_ptr<int32_t>()[sequence * block_table.size(1) + block];
  TORCH_CHECK_VALUE(0 <= page && page < num_pages, "block_table[", sequence, "][", block, "] is ", page,
                    ", expected a page in 0..", num_pages - 1);
  return page;
}

// Pages of one layer, k [P, G, K, S] and v [P, G, S, K], or of all layers, [L, P, ...]: no size is 0, so that positions
// and heads can be divided by theirs.
inline void CheckPagesOf(const at::Tensor& k, const at::Tensor& v, at::ScalarType dtype, bool all_layers) {
  const int64_t lead = all_layers ? 1 : 0;
  const char *k_name = all_layers ? "k_cache" : "k_pages", *v_name = all_layers ? "v_cache" : "v_pages";
  TORCH_CHECK_VALUE(k.dim() == 4 + lead, k_name, " must have ", 4 + lead, " dimensions, got ", k.sizes());
  const int64_t pages = k.size(lead), heads = k.size(lead + 1), head_dim = k.size(lead + 2), size = k.size(lead + 3);
  if (all_layers) {
    CheckTensor(k_name, k, dtype, {kAny, kAny, kAny, kAny, kAny});
    CheckTensor(v_name, v, dtype, {k.size(0), pages, heads, size, head_dim});
  } else {
    CheckTensor(k_name, k, dtype, {kAny, kAny, kAny, kAny});
    CheckTensor(v_name, v, dtype, {pages, heads, size, head_dim});
  }
  CheckNotEmpty(k_name, k);
}

// All pages a sequence needs up to and including `position`.
inline void CheckPages(const at::Tensor& block_table, int64_t sequence, int64_t position, int64_t page_size,
                       int64_t num_pages) {
  for (int64_t p = 0; p <= position; p += page_size) CheckedPage(block_table, sequence, p, page_size, num_pages);
  CheckedPage(block_table, sequence, position, page_size, num_pages);
}

// Rule 6: NaN never wins silently.
inline void CheckNoNan(bool has_nan) {
  TORCH_CHECK(!has_nan,
              "norm_head_argmax: a logit is NaN, so no token can be chosen: the activations overflowed (fp16 holds at "
              "most 65504; try dtype=torch.bfloat16) or the weights are damaged");
}

inline Dtype ModelDtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    case at::kFloat:
      return Dtype::kFloat32;
    default:
      TORCH_CHECK_TYPE(false, "unsupported dtype ", dtype, "; supported: bfloat16, float16, float32");
  }
}

}  // namespace layerskip
