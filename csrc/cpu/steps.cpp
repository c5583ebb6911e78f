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
  CheckPacked("embedding", weights[0], dtype, vocab_size, hidden);
  CheckTensor("final_norm", weights[1], dtype, {hidden});
  CheckPacked("lm_head", weights[2], dtype, vocab_size, hidden);
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
                  weights[2].const_data_ptr(),
                  weights[3].const_data_ptr<float>(),
                  weights[4].const_data_ptr<float>(),
                  {}};
  model.layers.reserve(layers);
  for (int64_t l = 0; l < layers; ++l) {
    const Tensor* w = &weights[kModelWeights + l * kLayerWeights];
    CheckTensor("attn_norm", w[0], dtype, {hidden});
    CheckPacked("wq", w[1], dtype, shape.q_size(), hidden);
    CheckPacked("wk", w[2], dtype, shape.kv_size(), hidden);
    CheckPacked("wv", w[3], dtype, shape.kv_size(), hidden);
    CheckPacked("wo", w[5], dtype, hidden, shape.q_size());
    CheckTensor("mlp_norm", w[7], dtype, {hidden});
    CheckPacked("w_gate", w[8], dtype, intermediate_size, hidden);
    CheckPacked("w_up", w[9], dtype, intermediate_size, hidden);
    CheckPacked("w_down", w[10], dtype, hidden, intermediate_size);
    model.layers.push_back({w[0].const_data_ptr(), w[1].const_data_ptr(), w[2].const_data_ptr(), w[3].const_data_ptr(),
                            CheckBias("qkv_bias", w[4], dtype, shape.q_size() + 2 * shape.kv_size()),
                            w[5].const_data_ptr(), CheckBias("out_bias", w[6], dtype, hidden), w[7].const_data_ptr(),
                            w[8].const_data_ptr(), w[9].const_data_ptr(), w[10].const_data_ptr()});
  }
  return model;
}

// The rows of a call, checked, and sorted by depth: rows join a move when it reaches their depth.
Rows CheckedRows(const Tensor& tokens, const Tensor& positions, const Tensor& depths, const Tensor& query_start_loc,
                 const Tensor& block_table, const ModelView& model, int64_t max_positions, const CacheView& cache) {
  CheckTensor("tokens", tokens, at::kLong, {kAny});
  const int64_t count = tokens.numel();
  TORCH_CHECK_VALUE(count >= 1, "tokens is empty: a step needs at least one row");
  CheckTensor("positions", positions, at::kLong, {count});
  CheckTensor("depths", depths, at::kInt, {count});
  CheckStarts(query_start_loc, count);
  const int64_t* token = tokens.const_data_ptr<int64_t>();
  const int64_t* position = positions.const_data_ptr<int64_t>();
  const int32_t* depth = depths.const_data_ptr<int32_t>();
  const int32_t* starts = query_start_loc.const_data_ptr<int32_t>();
  CheckRange("tokens", token, count, 0, model.vocab_size);
  CheckRange("positions", position, count, 0, max_positions);
  const auto num_layers = static_cast<int64_t>(model.layers.size());
  std::vector<int32_t> sequence(count);
  std::vector<int64_t> slot(count);
  for (int64_t b = 0; b + 1 < query_start_loc.numel(); ++b) {
    for (int64_t r = starts[b]; r < starts[b + 1]; ++r) {
      const bool first = r == starts[b];
      TORCH_CHECK_VALUE(first || position[r] == position[r - 1] + 1, "positions of sequence ", b,
                        " must be consecutive");
      TORCH_CHECK_VALUE(0 <= depth[r] && depth[r] <= (first ? num_layers : depth[r - 1]), "depths of sequence ", b,
                        " must be a staircase: within 0..", num_layers, " and never rising");
      sequence[r] = static_cast<int32_t>(b);
      slot[r] = CheckedPage(block_table, b, position[r], cache.page_size, cache.num_pages) * cache.page_size +
                position[r] % cache.page_size;
    }
    if (starts[b] < starts[b + 1])
      CheckPages(block_table, b, position[starts[b + 1] - 1], cache.page_size, cache.num_pages);
  }
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return depth[a] < depth[b]; });
  Rows rows;
  for (const int64_t r : order) {
    rows.tokens.push_back(token[r]);
    rows.positions.push_back(position[r]);
    rows.slots.push_back(slot[r]);
    rows.given.push_back(r);
    rows.sequences.push_back(sequence[r]);
    rows.depths.push_back(depth[r]);
  }
  return rows;
}

}  // namespace

void run_layers(TensorList weights, Tensor k_cache, Tensor v_cache, Tensor hidden_cache, const Tensor& tokens,
                const Tensor& positions, const Tensor& depths, const Tensor& query_start_loc, const Tensor& block_table,
                int64_t stop, int64_t num_heads, int64_t intermediate_size, int64_t vocab_size, double eps,
                double scale) {
  const int64_t sequences = query_start_loc.numel() - 1;
  const Cache cache(k_cache, v_cache, hidden_cache, block_table, sequences);
  TORCH_CHECK_VALUE(1 <= stop && stop <= cache.layers, "stop is ", stop, ", expected 1..", cache.layers);
  const ModelView model =
      CheckedModel(weights, k_cache, hidden_cache, num_heads, intermediate_size, vocab_size, eps, scale);
  Move move(model, cache.view,
            CheckedRows(tokens, positions, depths, query_start_loc, block_table, model, weights[3].size(0), cache.view),
            sequences, stop);
  InParallel([&](const Team& team) { move.Run(team); });
}

Tensor draft_step(TensorList weights, Tensor k_cache, Tensor v_cache, Tensor hidden_cache, const Tensor& tokens,
                  const Tensor& positions, const Tensor& num_drafts, const Tensor& block_table, int64_t exit_layer,
                  int64_t max_drafts, int64_t num_heads, int64_t intermediate_size, int64_t vocab_size, double eps,
                  double scale) {
  const int64_t sequences = tokens.numel();
  const Cache cache(k_cache, v_cache, hidden_cache, block_table, sequences);
  TORCH_CHECK_VALUE(1 <= exit_layer && exit_layer < cache.layers, "exit_layer is ", exit_layer, ", expected 1..",
                    cache.layers - 1);
  const ModelView model =
      CheckedModel(weights, k_cache, hidden_cache, num_heads, intermediate_size, vocab_size, eps, scale);
  CheckTensor("num_drafts", num_drafts, at::kLong, {sequences});
  const int64_t* drafts_wanted = num_drafts.const_data_ptr<int64_t>();
  CheckRange("num_drafts", drafts_wanted, sequences, 0, max_drafts + 1);
  Tensor drafts = at::full({sequences, max_drafts}, -1, at::kLong);
  int64_t* draft = drafts.mutable_data_ptr<int64_t>();

  // Draft i is a move of one row for each sequence that still drafts; its token is the row of move i + 1.
  struct Cycle {
    std::vector<int64_t> sequences;
    std::unique_ptr<Move> move;
    std::unique_ptr<Head> head;
  };
  std::vector<Cycle> cycles;
  Buffer logits(sequences * vocab_size);
  const Tensor depth = at::full({sequences}, 0, at::kInt);
  for (int64_t i = 0; i < max_drafts; ++i) {
    // A sequence that no longer drafts has no row: its start is its end.
    std::vector<int64_t> drafting;
    std::vector<int32_t> starts = {0};
    for (int64_t b = 0; b < sequences; ++b) {
      if (drafts_wanted[b] > i) drafting.push_back(b);
      starts.push_back(static_cast<int32_t>(drafting.size()));
    }
    if (drafting.empty()) break;
    const auto count = static_cast<int64_t>(drafting.size());
    Tensor at_position = at::empty({count}, at::kLong), first_token = at::empty({count}, at::kLong);
    Tensor start_loc = at::empty({sequences + 1}, at::kInt);
    std::copy(starts.begin(), starts.end(), start_loc.mutable_data_ptr<int32_t>());
    for (int64_t r = 0; r < count; ++r) {
      at_position.mutable_data_ptr<int64_t>()[r] = positions.const_data_ptr<int64_t>()[drafting[r]] + i;
      first_token.mutable_data_ptr<int64_t>()[r] = tokens.const_data_ptr<int64_t>()[drafting[r]];
    }
    Rows rows = CheckedRows(first_token, at_position, depth.narrow(0, 0, count), start_loc, block_table, model,
                            weights[3].size(0), cache.view);
    cycles.push_back({std::move(drafting),
                      std::make_unique<Move>(model, cache.view, std::move(rows), sequences, exit_layer),
                      std::make_unique<Head>(model.final_norm, model.lm_head, model.shape.hidden_size, vocab_size,
                                             model.eps, count, logits)});
  }
  InParallel([&](const Team& team) {
    for (size_t i = 0; i < cycles.size(); ++i) {
      Cycle& cycle = cycles[i];
      cycle.move->Run(team);
      cycle.head->Run(team, *model.kernels, cycle.move->hidden());
      if (team.rank == 0) {
        for (size_t r = 0; r < cycle.sequences.size(); ++r)
          draft[cycle.sequences[r] * max_drafts + i] = cycle.head->tokens[r];
        if (i + 1 < cycles.size())
          for (size_t r = 0; r < cycles[i + 1].sequences.size(); ++r)
            cycles[i + 1].move->rows().tokens[r] = draft[cycles[i + 1].sequences[r] * max_drafts + i];
      }
      team.Barrier();
    }
  });
  for (const Cycle& cycle : cycles) CheckNoNan(cycle.head->has_nan);
  return drafts;
}

std::tuple<Tensor, Tensor, Tensor> verify_step(TensorList weights, Tensor k_cache, Tensor v_cache, Tensor hidden_cache,
                                               const Tensor& tokens, const Tensor& positions, const Tensor& depths,
                                               const Tensor& query_start_loc, const Tensor& num_drafts,
                                               const Tensor& block_table, int64_t num_heads, int64_t intermediate_size,
                                               int64_t vocab_size, double eps, double scale) {
  const int64_t sequences = query_start_loc.numel() - 1;
  const Cache cache(k_cache, v_cache, hidden_cache, block_table, sequences);
  const ModelView model =
      CheckedModel(weights, k_cache, hidden_cache, num_heads, intermediate_size, vocab_size, eps, scale);
  Move move(model, cache.view,
            CheckedRows(tokens, positions, depths, query_start_loc, block_table, model, weights[3].size(0), cache.view),
            sequences, cache.layers);
  CheckTensor("num_drafts", num_drafts, at::kLong, {sequences});
  const int32_t* starts = query_start_loc.const_data_ptr<int32_t>();
  const int64_t* drafts = num_drafts.const_data_ptr<int64_t>();

  // Judged rows, in the order given, and where each stands in the move.
  std::vector<int64_t> place(tokens.numel()), judged;
  for (int64_t i = 0; i < tokens.numel(); ++i) place[move.rows().given[i]] = i;
  for (int64_t b = 0; b < sequences; ++b) {
    TORCH_CHECK_VALUE(0 <= drafts[b] && drafts[b] < starts[b + 1] - starts[b], "num_drafts[", b, "] is ", drafts[b],
                      ", expected 0 or more and fewer than the sequence's ", starts[b + 1] - starts[b], " rows");
    for (int64_t r = starts[b + 1] - drafts[b] - 1; r < starts[b + 1]; ++r) judged.push_back(place[r]);
  }
  const auto count = static_cast<int64_t>(judged.size());
  const int64_t hidden_size = model.shape.hidden_size;
  Buffer hidden(count * hidden_size);
  Tensor logits = at::empty({count, vocab_size}, at::kFloat), targets = at::empty({count}, at::kLong);
  Head head(model.final_norm, model.lm_head, hidden_size, vocab_size, model.eps, count,
            logits.mutable_data_ptr<float>());
  InParallel([&](const Team& team) {
    move.Run(team);
    const Range mine = team.Share(count);
    for (int64_t i = mine.begin; i < mine.end; ++i)
      std::copy_n(move.hidden() + judged[i] * hidden_size, hidden_size, hidden + i * hidden_size);
    team.Barrier();
    head.Run(team, *model.kernels, hidden);
  });
  CheckNoNan(head.has_nan);
  std::copy(head.tokens.begin(), head.tokens.end(), targets.mutable_data_ptr<int64_t>());
  auto [num_accepted, next_tokens] = accept_draft(tokens, targets, query_start_loc, num_drafts);
  return {num_accepted, next_tokens, logits};
}

}  // namespace layerskip
