// The operands of a pass, from tensors to checked views: layerskip_kernels/operands.py names the same groups.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <vector>

#include "layers.h"

namespace layerskip {

// Weights as one flat list, in the order of ModelWeights.flat, and ModelSizes as its ints and floats. The tensors must
// outlive the view.
ModelView CheckedModel(at::TensorList weights, int64_t kv_heads, int64_t head_dim, at::IntArrayRef ints,
                       at::ArrayRef<double> floats);

// A model that passes know by the number that keep_model gave.
struct KeptModel {
  std::vector<at::Tensor> tensors;
  ModelView view;

  // Of the final norm, and of all that is not rounded.
  at::ScalarType dtype() const { return tensors[1].scalar_type(); }
};

// Raises ValueError for a number that is not known, and for pages of another model.
std::shared_ptr<const KeptModel> ModelFor(int64_t model, const at::Tensor& k_cache, const at::Tensor& hidden_cache);

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
  int64_t exit_layer;
  std::shared_ptr<const KeptModel> kept;
  CacheView cache;

  const ModelView& model() const { return kept->view; }
};

// Those that rows pass up to layer `stop`, in the order of their exits: `adapters` are the numbers of their layers, `k`
// and `v` their pages; `cache`: the model's.
std::vector<AdapterView> CheckedAdapters(at::IntArrayRef exits, at::IntArrayRef adapters, at::TensorList k,
                                         at::TensorList v, const at::Tensor& hidden_cache,
                                         const at::Tensor& block_table, const CacheView& cache, int64_t stop);

}  // namespace layerskip
