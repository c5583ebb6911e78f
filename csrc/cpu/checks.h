// Checks at the edge of the ops: after them, no kernel reads or writes outside its tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <initializer_list>

#include "kernels.h"

namespace layerskip {

inline constexpr int64_t kAny = -1;

inline void CheckTensor(const char* name, const at::Tensor& tensor, at::ScalarType dtype,
                        std::initializer_list<int64_t> sizes) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, name, " must be ", dtype, ", got ", tensor.scalar_type());
  bool equal = tensor.dim() == static_cast<int64_t>(sizes.size());
  const int64_t* size = sizes.begin();
  for (int64_t i = 0; equal && i < tensor.dim(); ++i) equal = size[i] == kAny || size[i] == tensor.size(i);
  TORCH_CHECK_VALUE(equal, name, " must have the shape ", c10::IntArrayRef(sizes), " (-1: any), got ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, " must be contiguous; call .contiguous() first");
}

// A packed linear weight [N, K] in the model's dtype or in int8.
inline WeightView CheckPacked(const char* name, const at::Tensor& weight, at::ScalarType dtype, int64_t n, int64_t k) {
  const bool is_int8 = weight.scalar_type() == at::kChar;
  CheckTensor(name, weight, is_int8 ? at::kChar : dtype,
              {(n + kGroup - 1) / kGroup, is_int8 ? k + kScaleRows : k, kGroup});
  return {weight.const_data_ptr(), is_int8};
}

// An absent bias is None for an op and an empty tensor in a step's list of weights.
inline const void* CheckBias(const char* name, const std::optional<at::Tensor>& bias, at::ScalarType dtype, int64_t n) {
  if (!bias.has_value() || bias->numel() == 0) return nullptr;
  CheckTensor(name, *bias, dtype, {n});
  return bias->const_data_ptr();
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

// Drafts are a sequence's last rows, after at least one row more; with a negative count no row is judged.
inline void CheckDraftCounts(const int64_t* num_drafts, const int32_t* starts, int64_t num_sequences) {
  for (int64_t b = 0; b < num_sequences; ++b) {
    const int64_t rows = starts[b + 1] - starts[b];
    TORCH_CHECK_VALUE(num_drafts[b] < 0 || num_drafts[b] < rows, "num_drafts[", b, "] is ", num_drafts[b],
                      ", expected fewer than the sequence's ", rows, " rows, or a negative number to judge none");
  }
}

// The rows of a sequence that are judged: its drafts and the row before them.
inline int64_t JudgedRows(int64_t num_drafts) { return std::max<int64_t>(num_drafts + 1, 0); }

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
