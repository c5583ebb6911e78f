// run_layers and verify_pass: tensors become views, rows become moves, and each pass is one parallel region.
#include <ATen/ops/empty.h>

#include <algorithm>

#include "checks.h"
#include "layers.h"
#include "operands.h"
#include "ops.h"

namespace layerskip {

namespace {

// Raises rows below an adapter's exit to it and leaves their K and V there; the hidden states that are kept are the
// exit's.
void PassAdapter(const ModelView& model, const AdapterView& adapter, const CacheView& cache, int64_t num_sequences,
                 SortedRows& rows) {
  const int64_t exit_layer = adapter.exit_layer;
  const auto below = std::lower_bound(rows.depths.begin(), rows.depths.end(), exit_layer) - rows.depths.begin();
  if (below == 0) return;
  SortedRows lower = rows.First(below), at_exit = lower;
  at_exit.depths.assign(below, 1);
  Move to_exit(model, cache, std::move(lower), num_sequences, exit_layer);
  Move onward(adapter.model(), adapter.cache, std::move(at_exit), num_sequences, adapter.model().num_layers(),
              /*keeps=*/false);
  RunPass(VerifyKind(below), below, [&](Team& team) {
    to_exit.Run(team);
    onward.Run(team);
  });
  std::fill_n(rows.depths.begin(), below, static_cast<int32_t>(exit_layer));
}

}  // namespace

void run_layers(int64_t kept, Tensor k_cache, Tensor v_cache, Tensor hidden_cache, const Tensor& tokens,
                const Tensor& positions, const Tensor& depths, const Tensor& query_start_loc, const Tensor& block_table,
                int64_t stop) {
  const PendingRows pending = CheckedPendingRows(tokens, positions, depths, query_start_loc);
  const CacheView cache = CheckedCache(k_cache, v_cache, hidden_cache, block_table, pending.num_sequences);
  const std::shared_ptr<const KeptModel> kept_model = ModelFor(kept, k_cache, hidden_cache);
  const ModelView& model = kept_model->view;
  TORCH_CHECK_VALUE(1 <= stop && stop <= model.num_layers(), "stop is ", stop, ", expected 1..", model.num_layers());
  Move move(model, cache, CheckedRows(pending, block_table, model, cache), pending.num_sequences, stop);
  RunPass(VerifyKind(pending.count), pending.count, [&](Team& team) { move.Run(team); });
}

std::tuple<Tensor, Tensor, Tensor> verify_pass(int64_t kept, Tensor k_cache, Tensor v_cache, Tensor hidden_cache,
                                               const Tensor& tokens, const Tensor& positions, const Tensor& depths,
                                               const Tensor& query_start_loc, const Tensor& num_drafts,
                                               const Tensor& judged, const Tensor& block_table,
                                               at::IntArrayRef adapter_exits, at::IntArrayRef adapters,
                                               TensorList adapter_k, TensorList adapter_v) {
  const PendingRows pending = CheckedPendingRows(tokens, positions, depths, query_start_loc);
  const int64_t sequences = pending.num_sequences;
  const CacheView cache = CheckedCache(k_cache, v_cache, hidden_cache, block_table, sequences);
  const std::shared_ptr<const KeptModel> kept_model = ModelFor(kept, k_cache, hidden_cache);
  const ModelView& model = kept_model->view;
  SortedRows rows = CheckedRows(pending, block_table, model, cache);
  const DraftCounts counts = CheckedDraftCounts(num_drafts, judged, pending.starts, sequences);
  const std::vector<AdapterView> passed = CheckedAdapters(adapter_exits, adapters, adapter_k, adapter_v, hidden_cache,
                                                          block_table, cache, model.num_layers() - 1);
  for (const AdapterView& adapter : passed) PassAdapter(model, adapter, cache, sequences, rows);
  Move move(model, cache, std::move(rows), sequences, model.num_layers());

  // Judged rows, in the order given, by their index in the move.
  std::vector<int64_t> index_in_move(tokens.numel()), judged_rows;
  for (int64_t i = 0; i < tokens.numel(); ++i) index_in_move[move.rows().given[i]] = i;
  for (int64_t b = 0; b < sequences; ++b) {
    for (int64_t r = pending.starts[b + 1] - counts.JudgedRows(b); r < pending.starts[b + 1]; ++r)
      judged_rows.push_back(index_in_move[r]);
  }
  const auto count = static_cast<int64_t>(judged_rows.size());
  const int64_t hidden_size = model.sizes.hidden_size;
  Buffer hidden(count * hidden_size);
  Tensor logits = at::empty({count, model.vocab_size}, at::kFloat), targets = at::empty({count}, at::kLong);
  Head head(model.final_norm, model.lm_head, hidden_size, model.vocab_size, model.logits, count,
            logits.mutable_data_ptr<float>());
  RunPass(VerifyKind(pending.count), pending.count, [&](Team& team) {
    move.Run(team);
    team.ForEach(count, 1, [&](int64_t i, int64_t) {
      std::copy_n(move.hidden() + judged_rows[i] * hidden_size, hidden_size, hidden + i * hidden_size);
    });
    if (count > 0) head.Run(team, model.kernels(), hidden);  // chunks of prompts alone need no token
  });
  CheckNoNan(head.has_nan);
  std::copy(head.tokens.begin(), head.tokens.end(), targets.mutable_data_ptr<int64_t>());
  auto [num_accepted, next_tokens] = accept_draft(tokens, targets, query_start_loc, num_drafts, judged);
  return {num_accepted, next_tokens, logits};
}

}  // namespace layerskip
