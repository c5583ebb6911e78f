// The operands of a pass, from tensors to checked views: layerskip_kernels/operands.py names the same groups.
#pragma once

#include <ATen/core/Tensor.h>

#include "layers.h"

namespace layerskip {

// Weights as one flat list, in the order of ModelWeights.flat, and ModelSizes as its ints and floats. The tensors must
// outlive the view.
ModelView CheckedModel(at::TensorList weights, const at::Tensor& k_cache, const at::Tensor& hidden_cache,
                       at::IntArrayRef ints, at::ArrayRef<double> floats);

CacheView CheckedCache(const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& hidden_cache,
                       const at::Tensor& block_table, int64_t num_sequences);

void CheckExit(int64_t exit_layer, const ModelView& model);

// The rows of a call, by sequence: rows starts[b] .. starts[b + 1] belong to sequence b.
struct PendingRows {
  const int64_t *tokens, *positions;
  const int32_t *depths, *starts;
  int64_t count, num_sequences;
};

PendingRows CheckedPendingRows(const at::Tensor& tokens, const at::Tensor& positions, const at::Tensor& depths,
                               const at::Tensor& query_start_loc);

// Checks rows against model and cache, and sorts them by depth: they join a move when it reaches their depth.
SortedRows CheckedRows(const PendingRows& pending, const at::Tensor& block_table, const ModelView& model,
                       const CacheView& cache);

// The LM head that drafts: the model's own, or the rows of it that stand for the token ids of a draft vocabulary.
struct DraftHead {
  WeightView weight;
  int64_t size;
  const int64_t* ids;  // [size], ascending; null: row n is token n
};

DraftHead CheckedDraftHead(const ModelView& model, const std::optional<at::Tensor>& weight,
                           const std::optional<at::Tensor>& ids, at::ScalarType dtype);

// The layers of an exit adapter and their pages, of which the first stand for all up to the exit and are never run.
struct AdapterView {
  ModelView model;
  CacheView cache;
};

// AdapterLayers as a call gives it: ModelWeights.flat, or nothing where there is no adapter.
struct AdapterTensors {
  at::TensorList weights;
  const std::optional<at::Tensor>&k_pages, &v_pages;
  at::IntArrayRef ints;
};

// `cache`: the model's; `floats`: of both. The tensors must outlive the view.
std::optional<AdapterView> CheckedAdapter(const AdapterTensors& adapter, const at::Tensor& hidden_cache,
                                          const at::Tensor& block_table, const CacheView& cache,
                                          at::ArrayRef<double> floats);

}  // namespace layerskip
