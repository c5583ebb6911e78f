// draft_pass: one parallel region for each draft, since what a sequence drafts next, and whether, depends on the last.
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <cmath>

#include "checks.h"
#include "edits.h"
#include "layers.h"
#include "operands.h"
#include "ops.h"
#include "sampling.h"

namespace layerskip {

namespace {

constexpr int64_t kMassPiece = 4096;  // columns whose probabilities one thread sums at a time

// A sequence that drafts, the row that it drafts from, and what it drafted before.
struct Drafting {
  int64_t sequence, token, position;
  const int64_t* drafted;
  int64_t num_drafted;
};

// DraftSampling.flat: the settings of each sequence. Temperature 0: the greatest of the exit's logits, edited.
class DraftSampling {
 public:
  DraftSampling(TensorList settings, int64_t sequences, int64_t vocab_size)
      : draws_(!settings.empty()), edits_(settings.slice(std::min<size_t>(6, settings.size())), sequences, vocab_size) {
    if (!draws_) return;
    TORCH_CHECK_VALUE(settings.size() >= 6, "sampling must hold 6 tensors, those of edits or none, got ",
                      settings.size());
    CheckTensor("temperatures", settings[0], at::kFloat, {sequences});
    CheckTensor("top_ks", settings[1], at::kLong, {sequences});
    CheckTensor("top_ps", settings[2], at::kDouble, {sequences});
    CheckTensor("min_ps", settings[3], at::kFloat, {sequences});
    CheckTensor("seeds", settings[4], at::kLong, {sequences});
    CheckTensor("samples", settings[5], at::kLong, {sequences});
    temperatures_ = settings[0].const_data_ptr<float>();
    top_ks_ = settings[1].const_data_ptr<int64_t>();
    top_ps_ = settings[2].const_data_ptr<double>();
    min_ps_ = settings[3].const_data_ptr<float>();
    seeds_ = settings[4].const_data_ptr<int64_t>();
    samples_ = settings[5].const_data_ptr<int64_t>();
    CheckRange("top_ks", top_ks_, sequences, 0, std::numeric_limits<int64_t>::max());
    CheckRange("samples", samples_, sequences, 0, int64_t{1} << 32);
  }

  bool draws() const { return draws_; }
  bool noisy(int64_t b) const { return draws_ && temperatures_[b] != 0.0f; }
  // Whether sequence b may take another token than the greatest of its exit's logits.
  bool changes(int64_t b) const { return noisy(b) || edits_.Changes(b); }
  const LogitEdits& edits() const { return edits_; }
  Filters filters(int64_t b) const { return {temperatures_[b], top_ks_[b], top_ps_[b], min_ps_[b]}; }
  NoiseKey key(int64_t b, int64_t position) const {
    return {static_cast<uint64_t>(seeds_[b]), static_cast<uint32_t>(position), Stream::kToken,
            static_cast<uint32_t>(samples_[b])};
  }

 private:
  bool draws_;
  LogitEdits edits_;
  const float *temperatures_ = nullptr, *min_ps_ = nullptr;
  const int64_t *top_ks_ = nullptr, *seeds_ = nullptr, *samples_ = nullptr;
  const double* top_ps_ = nullptr;
};

// DraftStops.flat: after which drafts a sequence stops.
class DraftStops {
 public:
  DraftStops(TensorList stops, int64_t sequences, int64_t max_drafts)
      : any_(!stops.empty()), max_drafts_(max_drafts), expected_(sequences, 1.0f) {
    if (!any_) return;
    TORCH_CHECK_VALUE(stops.size() == 3, "stops must hold 3 tensors or none, got ", stops.size());
    CheckTensor("edges", stops[0], at::kFloat, {kAny});
    num_edges_ = stops[0].numel();
    CheckTensor("acceptance", stops[1], at::kFloat, {sequences, num_edges_ + 1});
    CheckTensor("least", stops[2], at::kFloat, {sequences, max_drafts});
    edges_ = stops[0].const_data_ptr<float>();
    acceptance_ = stops[1].const_data_ptr<float>();
    least_ = stops[2].const_data_ptr<float>();
  }

  // Takes note of draft i's confidence. Whether the sequence goes on.
  bool GoesOn(int64_t b, int64_t i, float confidence) {
    if (!any_) return true;
    int64_t bucket = 0;
    for (int64_t e = 0; e < num_edges_; ++e) bucket += edges_[e] <= confidence;
    expected_[b] *= acceptance_[b * (num_edges_ + 1) + bucket];
    return expected_[b] >= least_[b * max_drafts_ + i];
  }

 private:
  bool any_;
  int64_t max_drafts_, num_edges_ = 0;
  const float *edges_ = nullptr, *acceptance_ = nullptr, *least_ = nullptr;
  std::vector<float> expected_;  // the probability that all drafts so far are accepted
};

// Memory for the drafts of a pass, taken once.
struct DraftBuffers {
  DraftBuffers(int64_t sequences, int64_t head_size, int64_t vocab_size, bool draws)
      : logits(sequences * head_size),
        filtered(draws ? sequences * head_size : 0),
        scores(draws ? sequences * vocab_size : 0) {
    for (int64_t t = 0; draws && t < NumThreads(); ++t) scratch.emplace_back(vocab_size);
  }
  Buffer logits, filtered, scores;
  std::vector<SamplingScratch> scratch;  // of each thread
};

// One draft of some sequences: moves of one row each to every adapter's exit, through it, and to the exit, the LM head,
// its confidence, and the choice of a token.
class DraftCycle {
 public:
  DraftCycle(const ModelView& model, const std::vector<AdapterView>& adapters, const DraftHead& head,
             const CacheView& cache, const Tensor& block_table, const std::vector<Drafting>& drafting,
             const DraftSampling& sampling, int64_t exit_layer, DraftBuffers& buffers,
             const std::vector<float*>& kept_scores)
      : model_(model),
        draft_head_(head),
        drafting_(drafting),
        sampling_(sampling),
        buffers_(buffers),
        kept_scores_(kept_scores),
        tokens(drafting.size()),
        confidences(drafting.size(), 0.0f),
        totals_(drafting.size()) {
    std::vector<int64_t> tokens, positions;
    std::vector<int32_t> starts = {0};  // a sequence that does not draft has no row
    for (const Drafting& from : drafting) {
      while (static_cast<int64_t>(starts.size()) <= from.sequence) starts.push_back(starts.back());
      tokens.push_back(from.token);
      positions.push_back(from.position);
      starts.push_back(static_cast<int32_t>(tokens.size()));
    }
    const int64_t num_sequences = block_table.size(0), count = Count();
    starts.resize(num_sequences + 1, static_cast<int32_t>(count));
    const auto add = [&](const ModelView& layers, const CacheView& pages, int64_t depth, int64_t stop, bool keeps) {
      const std::vector<int32_t> depths(count, static_cast<int32_t>(depth));
      const PendingRows pending{tokens.data(), positions.data(), depths.data(), starts.data(), count, num_sequences};
      moves_.push_back(std::make_unique<Move>(layers, pages, CheckedRows(pending, block_table, layers, pages),
                                              num_sequences, stop, keeps));
    };
    int64_t depth = 0;
    for (const AdapterView& adapter : adapters) {
      add(model, cache, depth, adapter.exit_layer, /*keeps=*/true);
      add(adapter.model(), adapter.cache, 1, adapter.model().num_layers(), /*keeps=*/false);
      depth = adapter.exit_layer;
    }
    if (depth < exit_layer) add(model, cache, depth, exit_layer, /*keeps=*/true);
    head_ = std::make_unique<Head>(model.final_norm, head.weight, model.sizes.hidden_size, head.size, model.logits,
                                   count, buffers.logits);
  }

  void Run(Team& team) {
    for (const std::unique_ptr<Move>& move : moves_) move->Run(team);
    head_->Run(team, model_.kernels(), moves_.back()->hidden());
    const int64_t size = draft_head_.size, pieces = (size + kMassPiece - 1) / kMassPiece;
    team.ForEach(Count() * pieces, 1, [&](int64_t i, int64_t) {
      const int64_t r = i / pieces, begin = i % pieces * kMassPiece, greatest = head_->tokens[r];
      const float* logits = buffers_.logits + r * size;
      if (greatest < 0 || !std::isfinite(logits[greatest])) return;
      totals_[r] += model_.kernels().mass_from(logits + begin, std::min(kMassPiece, size - begin), logits[greatest]);
    });
    team.ForEach(Count(), 1, [&](int64_t r, int64_t) {
      const double total = static_cast<double>(totals_[r].load());
      if (total > 0.0) confidences[r] = static_cast<float>(static_cast<double>(kMassOne) / total);
      tokens[r] = sampling_.changes(drafting_[r].sequence) ? Drawn(r, team.rank) : IdOf(head_->tokens[r]);
      if (tokens[r] < 0) all_chosen_ = false;
    });
  }

  // Raises RuntimeError where there was nothing to choose.
  void CheckChosen() const {
    CheckNoNan(head_->has_nan);
    CheckChoices(all_chosen_);
  }

 private:
  int64_t Count() const { return static_cast<int64_t>(drafting_.size()); }
  int64_t IdOf(int64_t row) const { return draft_head_.ids == nullptr || row < 0 ? row : draft_head_.ids[row]; }

  // The token drawn for row r, or -1. Noise goes by token ids, so scores are spread over all of them.
  int64_t Drawn(int64_t r, int64_t thread) {
    const auto& [b, token, position, drafted, num_drafted] = drafting_[r];
    const int64_t size = draft_head_.size, vocab_size = model_.vocab_size;
    float* logits = buffers_.logits + r * size;
    if (sampling_.edits().Changes(b))
      sampling_.edits().Apply({logits, size, draft_head_.ids}, b, position + 1, drafted, num_drafted);
    SamplingScratch& scratch = buffers_.scratch[thread];
    float* scores = kept_scores_.empty() ? buffers_.scores + r * vocab_size : kept_scores_[b];
    float* filtered = draft_head_.ids == nullptr ? scores : buffers_.filtered + r * size;
    if (!FilterRow(logits, size, sampling_.filters(b), scratch, filtered)) return -1;
    if (draft_head_.ids != nullptr) {
      std::fill_n(scores, vocab_size, kNever);
      for (int64_t i = 0; i < size; ++i) scores[draft_head_.ids[i]] = filtered[i];
    }
    if (sampling_.noisy(b)) return Draw(scores, vocab_size, sampling_.key(b, position + 1));
    const Maximum greatest = model_.kernels().argmax(scores, vocab_size);
    return IsChoice(greatest) ? greatest.index : -1;
  }

  const ModelView& model_;
  const DraftHead& draft_head_;
  const std::vector<Drafting>& drafting_;
  const DraftSampling& sampling_;
  DraftBuffers& buffers_;
  const std::vector<float*>& kept_scores_;    // where each sequence's scores are kept; empty: they are not
  std::vector<std::unique_ptr<Move>> moves_;  // one after the other; the head reads the last
  std::unique_ptr<Head> head_;

 public:
  std::vector<int64_t> tokens;     // of each row
  std::vector<float> confidences;  // of each row

 private:
  std::vector<std::atomic<int64_t>> totals_;
  std::atomic<bool> all_chosen_{true};
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> draft_pass(int64_t kept, Tensor k_cache, Tensor v_cache, Tensor hidden_cache,
                                                      const Tensor& tokens, const Tensor& positions,
                                                      const Tensor& num_drafts, const Tensor& block_table,
                                                      const OptionalTensor& draft_head, const OptionalTensor& draft_ids,
                                                      TensorList sampling, TensorList stops, int64_t exit_layer,
                                                      int64_t max_drafts, bool keep_scores,
                                                      at::IntArrayRef adapter_exits, at::IntArrayRef adapters,
                                                      TensorList adapter_k, TensorList adapter_v) {
  CheckTensor("tokens", tokens, at::kLong, {kAny});
  const int64_t sequences = tokens.numel();
  CheckTensor("positions", positions, at::kLong, {sequences});
  CheckTensor("num_drafts", num_drafts, at::kLong, {sequences});
  const int64_t* wanted = num_drafts.const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(0 <= max_drafts && max_drafts <= kMaxSize, "max_drafts must be in 0..", kMaxSize, ", got ",
                    max_drafts);
  CheckRange("num_drafts", wanted, sequences, 0, max_drafts + 1);
  const CacheView cache = CheckedCache(k_cache, v_cache, hidden_cache, block_table, sequences);
  const std::shared_ptr<const KeptModel> kept_model = ModelFor(kept, k_cache, hidden_cache);
  const ModelView& model = kept_model->view;
  CheckExit(exit_layer, model);
  const int64_t* position = positions.const_data_ptr<int64_t>();
  CheckRange("positions", position, sequences, 0, model.max_positions);
  const std::vector<AdapterView> passed =
      CheckedAdapters(adapter_exits, adapters, adapter_k, adapter_v, hidden_cache, block_table, cache, exit_layer);
  const DraftHead head = CheckedDraftHead(model, draft_head, draft_ids, k_cache.scalar_type());
  const DraftSampling settings(sampling, sequences, model.vocab_size);
  DraftStops stop_rule(stops, sequences, max_drafts);

  Tensor drafts = at::full({sequences, max_drafts}, -1, at::kLong);
  Tensor num_drafted = at::zeros({sequences}, at::kLong);
  Tensor confidences = at::zeros({sequences, max_drafts}, at::kFloat);
  Tensor scores = at::full({keep_scores ? sequences : 0, max_drafts, model.vocab_size}, kNever, at::kFloat);
  int64_t *draft = drafts.mutable_data_ptr<int64_t>(), *drafted = num_drafted.mutable_data_ptr<int64_t>();
  float *confidence = confidences.mutable_data_ptr<float>(), *score = scores.mutable_data_ptr<float>();

  DraftBuffers buffers(sequences, head.size, model.vocab_size, settings.draws());
  std::vector<Drafting> drafting;
  for (int64_t b = 0; b < sequences; ++b)
    if (wanted[b] > 0)
      drafting.push_back({b, tokens.const_data_ptr<int64_t>()[b], position[b], draft + b * max_drafts, 0});
  for (int64_t i = 0; !drafting.empty(); ++i) {
    std::vector<float*> kept;
    for (int64_t b = 0; keep_scores && b < sequences; ++b)
      kept.push_back(score + (b * max_drafts + i) * model.vocab_size);
    DraftCycle cycle(model, passed, head, cache, block_table, drafting, settings, exit_layer, buffers, kept);
    RunPass(PassKind::kDraft, static_cast<int64_t>(drafting.size()), [&](Team& team) { cycle.Run(team); });
    cycle.CheckChosen();
    std::vector<Drafting> going_on;
    for (size_t r = 0; r < drafting.size(); ++r) {
      const int64_t b = drafting[r].sequence;
      draft[b * max_drafts + i] = cycle.tokens[r];
      confidence[b * max_drafts + i] = cycle.confidences[r];
      drafted[b] = i + 1;
      if (stop_rule.GoesOn(b, i, cycle.confidences[r]) && i + 1 < wanted[b])
        going_on.push_back({b, cycle.tokens[r], drafting[r].position + 1, drafting[r].drafted, i + 1});
    }
    drafting = std::move(going_on);
  }
  return {drafts, num_drafted, confidences, scores};
}

}  // namespace layerskip
