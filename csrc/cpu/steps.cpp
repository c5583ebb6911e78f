// The steps: lists of tensors become views, rows become moves, and each step is one parallel region.
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <numeric>

#include "checks.h"
#include "layers.h"
#include "ops.h"

namespace layerskip {

namespace {

// The order of `weights`: reference.MODEL_WEIGHTS, then reference.LAYER_WEIGHTS for each layer.
constexpr int64_t kModelWeights = 5, kLayerWeights = 11;

struct Cache {
  Cache(const Tensor& k_cache, const Tensor& v_cache, const Tensor& hidden_cache, const Tensor& block_table,
        int64_t num_sequences)
      : layers(k_cache.size(0)) {
    const at::ScalarType dtype = k_cache.scalar_type();
    CheckTensor("k_cache", k_cache, dtype, {kAny, kAny, kAny, kAny, kAny});
    const int64_t pages = k_cache.size(1), page_size = k_cache.size(4);
    CheckTensor("v_cache", v_cache, dtype, {layers, pages, k_cache.size(2), page_size, k_cache.size(3)});
    CheckTensor("hidden_cache", hidden_cache, dtype, {pages, page_size, kAny});
    CheckTensor("block_table", block_table, at::kInt, {num_sequences, kAny});
    view = {static_cast<char*>(k_cache.mutable_data_ptr()),
            static_cast<char*>(v_cache.mutable_data_ptr()),
            static_cast<char*>(hidden_cache.mutable_data_ptr()),
            pages,
            page_size,
            k_cache.stride(0) * k_cache.element_size(),
            block_table.const_data_ptr<int32_t>(),
            block_table.size(1)};
  }
  int64_t layers;
  CacheView view;
};

ModelView CheckedModel(TensorList weights, const Tensor& k_cache, const Tensor& hidden_cache, int64_t num_heads,
                       int64_t intermediate_size, int64_t vocab_size, double eps, double scale) {
  const int64_t layers = k_cache.size(0), kv_heads = k_cache.size(2), head_dim = k_cache.size(3);
  TORCH_CHECK_VALUE(static_cast<int64_t>(weights.size()) == kModelWeights + layers * kLayerWeights, "weights holds ",
                    weights.size(), " tensors; the cache has ", layers, " layers, which need ",
                    kModelWeights + layers * kLayerWeights);
  TORCH_CHECK_VALUE(num_heads >= 1 && num_heads % kv_heads == 0, "num_heads is ", num_heads,
                    ", expected a multiple of ", kv_heads, ", the KV heads");
  const at::ScalarType dtype = k_cache.scalar_type();
  const Shape shape{hidden_cache.size(2), intermediate_size, num_heads, kv_heads, head_dim};
  const int64_t hidden = shape.hidden_size;
  CheckTensor("embedding", weights[0], dtype, {(vocab_size + kGroup - 1) / kGroup, hidden, kGroup});
  CheckTensor("final_norm", weights[1], dtype, {hidden});
  const WeightView lm_head = CheckPacked("lm_head", weights[2], dtype, vocab_size, hidden);
  CheckTensor("cos", weights[3], at::kFloat, {kAny, head_dim / 2});
  CheckTensor("sin", weights[4], at::kFloat, {weights[3].size(0), head_dim / 2});
  const Dtype model_dtype = ModelDtype(dtype);
  ModelView model{model_dtype,
                  &KernelsFor(model_dtype),
                  shape,
                  vocab_size,
                  static_cast<float>(eps),
                  static_cast<float>(scale),
                  weights[0].const_data_ptr(),
                  weights[1].const_data_ptr(),
                  lm_head,
                  weights[3].size(0),
                  weights[3].const_data_ptr<float>(),
                  weights[4].const_data_ptr<float>(),
                  {}};
  model.layers.reserve(layers);
  for (int64_t l = 0; l < layers; ++l) {
    const Tensor* w = &weights[kModelWeights + l * kLayerWeights];
    CheckTensor("attn_norm", w[0], dtype, {hidden});
    CheckTensor("mlp_norm", w[7], dtype, {hidden});
    model.layers.push_back({w[0].const_data_ptr(), CheckPacked("wq", w[1], dtype, shape.q_size(), hidden),
                            CheckPacked("wk", w[2], dtype, shape.kv_size(), hidden),
                            CheckPacked("wv", w[3], dtype, shape.kv_size(), hidden),
                            CheckBias("qkv_bias", w[4], dtype, shape.q_size() + 2 * shape.kv_size()),
                            CheckPacked("wo", w[5], dtype, hidden, shape.q_size()),
                            CheckBias("out_bias", w[6], dtype, hidden), w[7].const_data_ptr(),
                            CheckPacked("w_gate", w[8], dtype, intermediate_size, hidden),
                            CheckPacked("w_up", w[9], dtype, intermediate_size, hidden),
                            CheckPacked("w_down", w[10], dtype, hidden, intermediate_size)});
  }
  return model;
}

// The rows of a call, by sequence: rows starts[b] .. starts[b + 1] belong to sequence b.
struct GivenRows {
  const int64_t *tokens, *positions;
  const int32_t *depths, *starts;
  int64_t count, num_sequences;
};

GivenRows FromTensors(const Tensor& tokens, const Tensor& positions, const Tensor& depths,
                      const Tensor& query_start_loc) {
  CheckTensor("tokens", tokens, at::kLong, {kAny});
  const int64_t count = tokens.numel();
  TORCH_CHECK_VALUE(count >= 1, "tokens is empty: a step needs at least one row");
  CheckTensor("positions", positions, at::kLong, {count});
  CheckTensor("depths", depths, at::kInt, {count});
  CheckStarts(query_start_loc, count);
  return {tokens.const_data_ptr<int64_t>(),
          positions.const_data_ptr<int64_t>(),
          depths.const_data_ptr<int32_t>(),
          query_start_loc.const_data_ptr<int32_t>(),
          count,
          query_start_loc.numel() - 1};
}

// Checks rows against model and cache, and sorts them by depth: they join a move when it reaches their depth.
Rows CheckedRows(const GivenRows& given, const Tensor& block_table, const ModelView& model, const CacheView& cache) {
  CheckRange("tokens", given.tokens, given.count, 0, model.vocab_size);
  CheckRange("positions", given.positions, given.count, 0, model.max_positions);
  const auto num_layers = static_cast<int64_t>(model.layers.size());
  std::vector<int32_t> sequence(given.count);
  for (int64_t b = 0; b < given.num_sequences; ++b) {
    const int64_t begin = given.starts[b], end = given.starts[b + 1];
    for (int64_t r = begin; r < end; ++r) {
      TORCH_CHECK_VALUE(r == begin || given.positions[r] == given.positions[r - 1] + 1, "positions of sequence ", b,
                        " must be consecutive");
      const int64_t highest = r == begin ? num_layers : given.depths[r - 1];
      TORCH_CHECK_VALUE(0 <= given.depths[r] && given.depths[r] <= highest, "depths of sequence ", b,
                        " must be a staircase: within 0..", num_layers, " and never rising");
      sequence[r] = static_cast<int32_t>(b);
    }
    if (begin < end) CheckPages(block_table, b, given.positions[end - 1], cache.page_size, cache.num_pages);
  }
  std::vector<int64_t> order(given.count);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return given.depths[a] < given.depths[b]; });
  Rows rows;
  for (const int64_t r : order) {
    const int64_t position = given.positions[r];
    const int64_t page = cache.block_table[sequence[r] * cache.max_blocks + position / cache.page_size];
    rows.tokens.push_back(given.tokens[r]);
    rows.positions.push_back(position);
    rows.slots.push_back(page * cache.page_size + position % cache.page_size);
    rows.given.push_back(r);
    rows.sequences.push_back(sequence[r]);
    rows.depths.push_back(given.depths[r]);
  }
  return rows;
}

// The LM head that drafts: the model's own, or the rows of it that stand for the token ids of a draft vocabulary.
struct HeadView {
  WeightView weight;
  int64_t size;
  const int64_t* ids;  // [size], ascending; null: row n is token n
};

HeadView CheckedDraftHead(const ModelView& model, const OptionalTensor& draft_head, const OptionalTensor& draft_ids,
                          at::ScalarType dtype) {
  TORCH_CHECK_VALUE(draft_head.has_value() == draft_ids.has_value(), "draft_head and draft_ids come together or not");
  if (!draft_head.has_value()) return {model.lm_head, model.vocab_size, nullptr};
  CheckTensor("draft_ids", *draft_ids, at::kLong, {kAny});
  const int64_t size = draft_ids->numel();
  const int64_t* ids = draft_ids->const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(size >= 1, "draft_ids is empty; a draft needs at least one token to choose from");
  CheckRange("draft_ids", ids, size, 0, model.vocab_size);
  TORCH_CHECK_VALUE(std::is_sorted(ids, ids + size, std::less_equal<int64_t>()), "draft_ids must ascend");
  return {CheckPacked("draft_head", *draft_head, dtype, size, model.shape.hidden_size), size, ids};
}

// Draft i of all sequences that draft more than i tokens: a move of one row each, then the LM head.
class DraftCycle {
 public:
  // Rows start from first_tokens (one for each sequence, int64 [B]); Run replaces them by the drafts before it.
  DraftCycle(const ModelView& model, const HeadView& head, const CacheView& cache, const Tensor& block_table,
             const int64_t* first_tokens, const int64_t* first_positions, const int64_t* num_drafts,
             int64_t num_sequences, int64_t i, int64_t exit_layer, float* logits)
      : model_(model), ids_(head.ids) {
    std::vector<int64_t> tokens, positions;
    std::vector<int32_t> starts = {0};  // a sequence that no longer drafts has no row
    for (int64_t b = 0; b < num_sequences; ++b) {
      if (num_drafts[b] > i) {
        sequences_.push_back(b);
        tokens.push_back(first_tokens[b]);
        positions.push_back(first_positions[b] + i);
      }
      starts.push_back(static_cast<int32_t>(tokens.size()));
    }
    const auto count = static_cast<int64_t>(tokens.size());
    const std::vector<int32_t> depths(count, 0);
    const GivenRows given{tokens.data(), positions.data(), depths.data(), starts.data(), count, num_sequences};
    move_ =
        std::make_unique<Move>(model, cache, CheckedRows(given, block_table, model, cache), num_sequences, exit_layer);
    head_ = std::make_unique<Head>(model.final_norm, head.weight, model.shape.hidden_size, head.size, model.eps, count,
                                   logits);
  }

  // `drafts` [B, max_drafts]: reads column i - 1, writes column i.
  void Run(Team& team, int64_t i, int64_t max_drafts, int64_t* drafts) {
    const auto rows = static_cast<int64_t>(sequences_.size());
    team.ForEach(i > 0 ? rows : 0, 1,
                 [&](int64_t r, int64_t) { move_->rows().tokens[r] = drafts[sequences_[r] * max_drafts + i - 1]; });
    move_->Run(team);
    head_->Run(team, *model_.kernels, move_->hidden());
    team.ForEach(rows, 1, [&](int64_t r, int64_t) {
      const int64_t row = head_->tokens[r];
      drafts[sequences_[r] * max_drafts + i] = ids_ == nullptr || row < 0 ? row : ids_[row];
    });
  }

  bool has_nan() const { return head_->has_nan; }

 private:
  const ModelView& model_;
  const int64_t* ids_;
  std::vector<int64_t> sequences_;
  std::unique_ptr<Move> move_;
  std::unique_ptr<Head> head_;
};

}  // namespace

void run_layers(TensorList weights, Tensor k_cache, Tensor v_cache, Tensor hidden_cache, const Tensor& tokens,
                const Tensor& positions, const Tensor& depths, const Tensor& query_start_loc, const Tensor& block_table,
                int64_t stop, int64_t num_heads, int64_t intermediate_size, int64_t vocab_size, double eps,
                double scale) {
  const GivenRows given = FromTensors(tokens, positions, depths, query_start_loc);
  const Cache cache(k_cache, v_cache, hidden_cache, block_table, given.num_sequences);
  TORCH_CHECK_VALUE(1 <= stop && stop <= cache.layers, "stop is ", stop, ", expected 1..", cache.layers);
  const ModelView model =
      CheckedModel(weights, k_cache, hidden_cache, num_heads, intermediate_size, vocab_size, eps, scale);
  Move move(model, cache.view, CheckedRows(given, block_table, model, cache.view), given.num_sequences, stop);
  InParallel([&](Team& team) { move.Run(team); });
}

Tensor draft_step(TensorList weights, Tensor k_cache, Tensor v_cache, Tensor hidden_cache, const Tensor& tokens,
                  const Tensor& positions, const Tensor& num_drafts, const Tensor& block_table,
                  const OptionalTensor& draft_head, const OptionalTensor& draft_ids, int64_t exit_layer,
                  int64_t max_drafts, int64_t num_heads, int64_t intermediate_size, int64_t vocab_size, double eps,
                  double scale) {
  CheckTensor("tokens", tokens, at::kLong, {kAny});
  const int64_t sequences = tokens.numel();
  CheckTensor("positions", positions, at::kLong, {sequences});
  CheckTensor("num_drafts", num_drafts, at::kLong, {sequences});
  const int64_t* wanted = num_drafts.const_data_ptr<int64_t>();
  CheckRange("num_drafts", wanted, sequences, 0, max_drafts + 1);
  const Cache cache(k_cache, v_cache, hidden_cache, block_table, sequences);
  TORCH_CHECK_VALUE(1 <= exit_layer && exit_layer < cache.layers, "exit_layer is ", exit_layer, ", expected 1..",
                    cache.layers - 1);
  const ModelView model =
      CheckedModel(weights, k_cache, hidden_cache, num_heads, intermediate_size, vocab_size, eps, scale);
  const HeadView head = CheckedDraftHead(model, draft_head, draft_ids, k_cache.scalar_type());

  Tensor drafts = at::full({sequences, max_drafts}, -1, at::kLong);
  int64_t* draft = drafts.mutable_data_ptr<int64_t>();
  Buffer logits(sequences * head.size);
  const int64_t count = sequences > 0 ? *std::max_element(wanted, wanted + sequences) : 0;
  std::vector<DraftCycle> cycles;
  for (int64_t i = 0; i < count; ++i)
    cycles.emplace_back(model, head, cache.view, block_table, tokens.const_data_ptr<int64_t>(),
                        positions.const_data_ptr<int64_t>(), wanted, sequences, i, exit_layer, logits);
  InParallel([&](Team& team) {
    for (int64_t i = 0; i < count; ++i) cycles[i].Run(team, i, max_drafts, draft);
  });
  for (const DraftCycle& cycle : cycles) CheckNoNan(cycle.has_nan());
  return drafts;
}

std::tuple<Tensor, Tensor, Tensor> verify_step(TensorList weights, Tensor k_cache, Tensor v_cache, Tensor hidden_cache,
                                               const Tensor& tokens, const Tensor& positions, const Tensor& depths,
                                               const Tensor& query_start_loc, const Tensor& num_drafts,
                                               const Tensor& block_table, int64_t num_heads, int64_t intermediate_size,
                                               int64_t vocab_size, double eps, double scale) {
  const GivenRows given = FromTensors(tokens, positions, depths, query_start_loc);
  const int64_t sequences = given.num_sequences;
  const Cache cache(k_cache, v_cache, hidden_cache, block_table, sequences);
  const ModelView model =
      CheckedModel(weights, k_cache, hidden_cache, num_heads, intermediate_size, vocab_size, eps, scale);
  Move move(model, cache.view, CheckedRows(given, block_table, model, cache.view), sequences, cache.layers);
  CheckTensor("num_drafts", num_drafts, at::kLong, {sequences});
  const int64_t* drafts = num_drafts.const_data_ptr<int64_t>();
  CheckDraftCounts(drafts, given.starts, sequences);

  // Judged rows, in the order given, and where each stands in the move.
  std::vector<int64_t> place(tokens.numel()), judged;
  for (int64_t i = 0; i < tokens.numel(); ++i) place[move.rows().given[i]] = i;
  for (int64_t b = 0; b < sequences; ++b) {
    for (int64_t r = given.starts[b + 1] - JudgedRows(drafts[b]); r < given.starts[b + 1]; ++r)
      judged.push_back(place[r]);
  }
  const auto count = static_cast<int64_t>(judged.size());
  const int64_t hidden_size = model.shape.hidden_size;
  Buffer hidden(count * hidden_size);
  Tensor logits = at::empty({count, vocab_size}, at::kFloat), targets = at::empty({count}, at::kLong);
  Head head(model.final_norm, model.lm_head, hidden_size, vocab_size, model.eps, count,
            logits.mutable_data_ptr<float>());
  InParallel([&](Team& team) {
    move.Run(team);
    team.ForEach(count, 1, [&](int64_t i, int64_t) {
      std::copy_n(move.hidden() + judged[i] * hidden_size, hidden_size, hidden + i * hidden_size);
    });
    if (count > 0) head.Run(team, *model.kernels, hidden);  // chunks of prompts alone need no token
  });
  CheckNoNan(head.has_nan);
  std::copy(head.tokens.begin(), head.tokens.end(), targets.mutable_data_ptr<int64_t>());
  auto [num_accepted, next_tokens] = accept_draft(tokens, targets, query_start_loc, num_drafts);
  return {num_accepted, next_tokens, logits};
}

}  // namespace layerskip
