#include "operands.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <optional>
#include <vector>

#include "checks.h"

namespace layerskip {

using at::Tensor;

namespace {

struct ModelTensors {
  const Tensor &embedding, &final_norm, &lm_head, &cos, &sin;
};

struct LayerTensors {
  const Tensor &attn_norm, &wq, &wk, &wv, &qkv_bias, &wo, &out_bias, &mlp_norm, &w_gate, &w_up, &w_down, &q_norm,
      &k_norm, &attn_post_norm, &mlp_post_norm, &gate_up_bias, &down_bias;
};

// The one place that knows the order of the flat list (ModelWeights.flat in layerskip_kernels/operands.py).
constexpr int64_t kModelTensors = 5, kLayerTensors = 17;
// The same of ModelSizes.ints, after which come a window and a rope for each layer, and of ModelSizes.floats.
constexpr int64_t kInts = 4, kFloats = 8;

ModelTensors ModelOf(at::TensorList flat) {
  return {.embedding = flat[0], .final_norm = flat[1], .lm_head = flat[2], .cos = flat[3], .sin = flat[4]};
}

LayerTensors LayerOf(at::TensorList flat, int64_t layer) {
  const Tensor* t = &flat[kModelTensors + layer * kLayerTensors];
  return {.attn_norm = t[0],
          .wq = t[1],
          .wk = t[2],
          .wv = t[3],
          .qkv_bias = t[4],
          .wo = t[5],
          .out_bias = t[6],
          .mlp_norm = t[7],
          .w_gate = t[8],
          .w_up = t[9],
          .w_down = t[10],
          .q_norm = t[11],
          .k_norm = t[12],
          .attn_post_norm = t[13],
          .mlp_post_norm = t[14],
          .gate_up_bias = t[15],
          .down_bias = t[16]};
}

// One of the tables cos and sin [ropes, max_positions, rotary_dim / 2]; -1: none.
RopeTables RopeAt(const ModelTensors& tensors, int64_t table, int64_t head_dim) {
  const int64_t tables = tensors.cos.size(0), half = tensors.cos.size(2);
  TORCH_CHECK_VALUE(2 * half <= head_dim, "cos holds ", half, " frequencies, more than half of ", head_dim,
                    ", the length of a head");
  TORCH_CHECK_VALUE(-1 <= table && table < tables, "a layer has rope ", table, ", expected -1..", tables - 1);
  if (table < 0) return {nullptr, nullptr, 0};
  const int64_t at = table * tensors.cos.size(1) * half;
  return {tensors.cos.const_data_ptr<float>() + at, tensors.sin.const_data_ptr<float>() + at, 2 * half};
}

// A layer whose wq is empty has no attention: nothing else of it is read.
LayerWeights CheckedLayer(const LayerTensors& layer, const LayerSizes& sizes, at::ScalarType dtype) {
  const int64_t hidden = sizes.hidden_size, inner = sizes.intermediate_size;
  const bool attends = layer.wq.numel() > 0;
  const QkNorms norms =
      CheckQkNorms(layer.q_norm, layer.k_norm, dtype, sizes.q_size(), sizes.kv_size(), sizes.head_dim);
  const auto attention = [&](const char* name, const Tensor& weight, int64_t n, int64_t k) {
    return attends ? CheckPacked(name, weight, dtype, n, k) : WeightView{nullptr, WeightType::kDense};
  };
  return {.attends = attends,
          .attn_norm = CheckOptional("attn_norm", layer.attn_norm, dtype, hidden),
          .wq = attention("wq", layer.wq, sizes.q_size(), hidden),
          .wk = attention("wk", layer.wk, sizes.kv_size(), hidden),
          .wv = attention("wv", layer.wv, sizes.kv_size(), hidden),
          .qkv_bias = CheckOptional("qkv_bias", layer.qkv_bias, dtype, sizes.q_size() + 2 * sizes.kv_size()),
          .wo = attention("wo", layer.wo, hidden, sizes.q_size()),
          .out_bias = CheckOptional("out_bias", layer.out_bias, dtype, hidden),
          .mlp_norm = CheckOptional("mlp_norm", layer.mlp_norm, dtype, hidden),
          .w_gate = CheckPacked("w_gate", layer.w_gate, dtype, inner, hidden),
          .w_up = CheckPacked("w_up", layer.w_up, dtype, inner, hidden),
          .w_down = CheckPacked("w_down", layer.w_down, dtype, hidden, inner),
          .q_norm = norms.q,
          .k_norm = norms.k,
          .norms_heads = norms.heads,
          .attn_post_norm = CheckOptional("attn_post_norm", layer.attn_post_norm, dtype, hidden),
          .mlp_post_norm = CheckOptional("mlp_post_norm", layer.mlp_post_norm, dtype, hidden),
          .gate_up_bias = CheckOptional("gate_up_bias", layer.gate_up_bias, dtype, 2 * inner),
          .down_bias = CheckOptional("down_bias", layer.down_bias, dtype, hidden)};
}

}  // namespace

ModelView CheckedModel(at::TensorList weights, int64_t kv_heads, int64_t head_dim, at::IntArrayRef ints,
                       at::ArrayRef<double> floats) {
  const auto count = static_cast<int64_t>(weights.size()), layers = (count - kModelTensors) / kLayerTensors;
  TORCH_CHECK_VALUE(layers >= 1 && count == kModelTensors + layers * kLayerTensors, "weights holds ", count,
                    " tensors, expected ", kModelTensors, " and ", kLayerTensors, " for each layer");
  CheckSize("num_kv_heads", kv_heads);
  CheckSize("head_dim", head_dim);
  TORCH_CHECK_VALUE(static_cast<int64_t>(ints.size()) == kInts + 2 * layers, "ints holds ", ints.size(),
                    " numbers, expected ", kInts + 2 * layers, " for ", layers, " layers");
  TORCH_CHECK_VALUE(static_cast<int64_t>(floats.size()) == kFloats, "floats holds ", floats.size(),
                    " numbers, expected ", kFloats);
  const int64_t num_heads = ints[0], intermediate_size = ints[1], vocab_size = ints[2];
  const auto number = [&](int64_t i) { return static_cast<float>(floats[i]); };
  CheckSize("num_heads", num_heads);
  CheckSize("intermediate_size", intermediate_size);
  CheckSize("vocab_size", vocab_size);
  TORCH_CHECK_VALUE(num_heads % kv_heads == 0, "num_heads is ", num_heads, ", expected a multiple of ", kv_heads,
                    ", the KV heads");
  const ModelTensors tensors = ModelOf(weights);
  const at::ScalarType dtype = tensors.final_norm.scalar_type();
  const int64_t hidden = tensors.final_norm.numel();
  CheckSize("final_norm", hidden);
  const NormConstants norm{number(0), number(1)};
  const LayerSizes sizes{hidden, intermediate_size, num_heads, kv_heads, head_dim, norm};
  CheckTensor("final_norm", tensors.final_norm, dtype, {hidden});
  CheckTensor("cos", tensors.cos, at::kFloat, {kAny, kAny, kAny});
  CheckTensor("sin", tensors.sin, at::kFloat, {tensors.cos.size(0), tensors.cos.size(1), tensors.cos.size(2)});
  ModelView model{.dtype = ModelDtype(dtype),
                  .sizes = sizes,
                  .vocab_size = vocab_size,
                  .scale = number(2),
                  .score_cap = number(6),
                  .embedding_multiplier = number(3),
                  .residual_multiplier = number(4),
                  .gelu = ints[3] != 0,
                  .logits = {norm, number(5), number(7)},
                  .embedding = CheckPacked("embedding", tensors.embedding, dtype, vocab_size, hidden),
                  .final_norm = tensors.final_norm.const_data_ptr(),
                  .lm_head = CheckPacked("lm_head", tensors.lm_head, dtype, vocab_size, hidden),
                  .max_positions = tensors.cos.size(1),
                  .num_cached = 0,
                  .layers = {},
                  .kinds = {},
                  .windows = {},
                  .integers = {}};
  model.layers.reserve(layers);
  for (int64_t l = 0; l < layers; ++l) {
    model.layers.push_back(CheckedLayer(LayerOf(weights, l), sizes, dtype));
    if (model.layers.back().attends) model.num_cached = l + 1;
    model.kinds.push_back({RopeAt(tensors, ints[kInts + layers + l], head_dim), 0});
    const int64_t window = ints[kInts + l];
    TORCH_CHECK_VALUE(window >= 0, "the window of layer ", l, " is ", window, ", expected 0 or more");
    const auto known = std::find(model.windows.begin(), model.windows.end(), window);
    model.kinds.back().window_index = known - model.windows.begin();
    if (known == model.windows.end()) model.windows.push_back(window);
  }
  for (const LayerWeights& w : model.layers) {
    for (const WeightView weight : {w.wq, w.wk, w.wv, w.w_gate, w.w_up}) model.integers.Add(weight, hidden);
    model.integers.Add(w.wo, sizes.q_size());
    model.integers.Add(w.w_down, intermediate_size);
  }
  return model;
}

CacheView CheckedCache(const Tensor& k_cache, const Tensor& v_cache, const Tensor& hidden_cache,
                       const Tensor& block_table, int64_t num_sequences) {
  const at::ScalarType dtype = k_cache.scalar_type();
  CheckPagesOf(k_cache, v_cache, dtype, true);
  const int64_t pages = k_cache.size(1), page_size = k_cache.size(4);
  CheckTensor("hidden_cache", hidden_cache, dtype, {pages, page_size, kAny});
  CheckNotEmpty("hidden_cache", hidden_cache);
  CheckTensor("block_table", block_table, at::kInt, {num_sequences, kAny});
  return {.k = static_cast<char*>(k_cache.mutable_data_ptr()),
          .v = static_cast<char*>(v_cache.mutable_data_ptr()),
          .hidden = static_cast<char*>(hidden_cache.mutable_data_ptr()),
          .num_pages = pages,
          .page_size = page_size,
          .layer_bytes = k_cache.stride(0) * k_cache.element_size(),
          .block_table = block_table.const_data_ptr<int32_t>(),
          .max_blocks = block_table.size(1)};
}

void CheckExit(int64_t exit_layer, const ModelView& model) {
  TORCH_CHECK_VALUE(1 <= exit_layer && exit_layer < model.num_layers(), "exit_layer is ", exit_layer, ", expected 1..",
                    model.num_layers() - 1);
}

PendingRows CheckedPendingRows(const Tensor& tokens, const Tensor& positions, const Tensor& depths,
                               const Tensor& query_start_loc) {
  CheckTensor("tokens", tokens, at::kLong, {kAny});
  const int64_t count = tokens.numel();
  TORCH_CHECK_VALUE(count >= 1, "tokens is empty: a step needs at least one row");
  CheckTensor("positions", positions, at::kLong, {count});
  CheckTensor("depths", depths, at::kInt, {count});
  CheckStarts(query_start_loc, count);
  return {.tokens = tokens.const_data_ptr<int64_t>(),
          .positions = positions.const_data_ptr<int64_t>(),
          .depths = depths.const_data_ptr<int32_t>(),
          .starts = query_start_loc.const_data_ptr<int32_t>(),
          .count = count,
          .num_sequences = query_start_loc.numel() - 1};
}

SortedRows CheckedRows(const PendingRows& pending, const Tensor& block_table, const ModelView& model,
                       const CacheView& cache) {
  CheckRange("tokens", pending.tokens, pending.count, 0, model.vocab_size);
  CheckRange("positions", pending.positions, pending.count, 0, model.max_positions);
  std::vector<int32_t> sequence(pending.count);
  for (int64_t b = 0; b < pending.num_sequences; ++b) {
    const int64_t begin = pending.starts[b], end = pending.starts[b + 1];
    for (int64_t r = begin; r < end; ++r) {
      TORCH_CHECK_VALUE(r == begin || pending.positions[r] == pending.positions[r - 1] + 1, "positions of sequence ", b,
                        " must be consecutive");
      const int64_t highest = r == begin ? model.num_layers() : pending.depths[r - 1];
      TORCH_CHECK_VALUE(0 <= pending.depths[r] && pending.depths[r] <= highest, "depths of sequence ", b,
                        " must be a staircase: within 0..", model.num_layers(), " and never rising");
      sequence[r] = static_cast<int32_t>(b);
    }
    if (begin < end) CheckPages(block_table, b, pending.positions[end - 1], cache.page_size, cache.num_pages);
  }
  std::vector<int64_t> order(pending.count);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return pending.depths[a] < pending.depths[b]; });
  SortedRows rows;
  for (const int64_t r : order) {
    const int64_t position = pending.positions[r];
    const int64_t page = cache.block_table[sequence[r] * cache.max_blocks + position / cache.page_size];
    rows.tokens.push_back(pending.tokens[r]);
    rows.positions.push_back(position);
    rows.slots.push_back(page * cache.page_size + position % cache.page_size);
    rows.given.push_back(r);
    rows.sequences.push_back(sequence[r]);
    rows.depths.push_back(pending.depths[r]);
  }
  return rows;
}

DraftHead CheckedDraftHead(const ModelView& model, const std::optional<Tensor>& weight,
                           const std::optional<Tensor>& ids, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(weight.has_value() == ids.has_value(), "draft_head and draft_ids must be given together");
  if (!weight.has_value()) return {model.lm_head, model.vocab_size, nullptr};
  CheckTensor("draft_ids", *ids, at::kLong, {kAny});
  const int64_t size = ids->numel();
  const int64_t* id = ids->const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(size >= 1, "draft_ids is empty; a draft needs at least one token to choose from");
  CheckRange("draft_ids", id, size, 0, model.vocab_size);
  TORCH_CHECK_VALUE(std::is_sorted(id, id + size, std::less_equal<int64_t>()), "draft_ids must ascend");
  return {CheckPacked("draft_head", *weight, dtype, size, model.sizes.hidden_size), size, id};
}

std::vector<AdapterView> CheckedAdapters(at::IntArrayRef exits, at::IntArrayRef adapters, at::TensorList k,
                                         at::TensorList v, const Tensor& hidden_cache, const Tensor& block_table,
                                         const CacheView& cache, int64_t stop) {
  const size_t count = exits.size();
  TORCH_CHECK_VALUE(adapters.size() == count && k.size() == count && v.size() == count,
                    "adapter_exits, adapters, adapter_k and adapter_v must be of one length, got ", count, ", ",
                    adapters.size(), ", ", k.size(), " and ", v.size());
  std::vector<AdapterView> views;
  for (size_t i = 0; i < count; ++i) {
    const int64_t lowest = i == 0 ? 1 : exits[i - 1] + 1;
    TORCH_CHECK_VALUE(lowest <= exits[i] && exits[i] <= stop, "adapter_exits[", i, "] is ", exits[i], ", expected ",
                      lowest, "..", stop, ": they ascend, up to the layer that rows rise to");
    const CacheView pages = CheckedCache(k[i], v[i], hidden_cache, block_table, block_table.size(0));
    TORCH_CHECK_VALUE(pages.page_size == cache.page_size, "adapter_k[", i, "] has pages of ", pages.page_size,
                      " positions, expected ", cache.page_size);
    views.push_back({exits[i], ModelFor(adapters[i], k[i], hidden_cache), pages});
    TORCH_CHECK_VALUE(views.back().model().num_layers() >= 2, "adapters[", i, "] has ",
                      views.back().model().num_layers(), " layers, expected at least 2");
  }
  return views;
}

}  // namespace layerskip
