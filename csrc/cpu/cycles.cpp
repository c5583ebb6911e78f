// decode_pass: some cycles of draft_pass and verify_pass in one call, so that what stands between two passes is a few
// integers and not Python, whose code and data the weights have driven out of the caches.
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <chrono>
#include <unordered_set>
#include <vector>

#include "checks.h"
#include "operands.h"
#include "ops.h"

namespace layerskip {

namespace {

constexpr int64_t kMostCycles = 1024;

using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point begun) { return std::chrono::duration<double>(Clock::now() - begun).count(); }

// The tensors of PendingRows: each sequence's last token and its drafts, of which the last has passed no layer yet.
struct Pending {
  Pending(const Tensor& last_tokens, const Tensor& first_positions, const Tensor& drafts, const Tensor& num_drafted,
          int64_t exit_layer) {
    const int64_t sequences = last_tokens.numel(), width = drafts.size(1);
    const auto* counts = num_drafted.const_data_ptr<int64_t>();
    int64_t total = sequences;
    for (int64_t b = 0; b < sequences; ++b) total += counts[b];
    tokens = at::zeros({total}, at::kLong);
    positions = at::zeros({total}, at::kLong);
    depths = at::zeros({total}, at::kInt);
    starts = at::zeros({sequences + 1}, at::kInt);
    auto *token = tokens.mutable_data_ptr<int64_t>(), *position = positions.mutable_data_ptr<int64_t>();
    auto *depth = depths.mutable_data_ptr<int32_t>(), *start = starts.mutable_data_ptr<int32_t>();
    for (int64_t b = 0, row = 0; b < sequences; ++b) {
      const int64_t first = first_positions.const_data_ptr<int64_t>()[b];
      for (int64_t i = 0; i <= counts[b]; ++i, ++row) {
        token[row] =
            i == 0 ? last_tokens.const_data_ptr<int64_t>()[b] : drafts.const_data_ptr<int64_t>()[b * width + i - 1];
        position[row] = first + i;
        depth[row] = i < counts[b] ? static_cast<int32_t>(exit_layer) : 0;
      }
      start[b + 1] = static_cast<int32_t>(row);
    }
  }
  Tensor tokens, positions, depths, starts;
};

// What a pass takes of exit adapters.
struct Adapters {
  void Add(int64_t exit_layer, int64_t number, const Tensor& k_pages, const Tensor& v_pages) {
    exits.push_back(exit_layer);
    numbers.push_back(number);
    k.push_back(k_pages);
    v.push_back(v_pages);
  }
  std::vector<int64_t> exits, numbers;
  std::vector<Tensor> k, v;
};

// The tokens that end each sequence's text.
class Ends {
 public:
  Ends(const Tensor& ends, int64_t sequences) : of_(sequences) {
    CheckTensor("ends", ends, at::kLong, {sequences, kAny});
    const int64_t* id = ends.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < ends.numel(); ++i)
      if (id[i] >= 0) of_[i / ends.size(1)].insert(id[i]);
  }
  bool Has(int64_t b, int64_t token) const { return of_[b].count(token) > 0; }

 private:
  std::vector<std::unordered_set<int64_t>> of_;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> decode_pass(
    int64_t kept, int64_t drafting, Tensor k_cache, Tensor v_cache, Tensor hidden_cache, const Tensor& tokens,
    const Tensor& positions, const Tensor& num_drafts, const Tensor& block_table, const OptionalTensor& draft_head,
    const OptionalTensor& draft_ids, TensorList stops, const Tensor& ends, int64_t exit_layer, int64_t max_drafts,
    int64_t num_cycles, at::IntArrayRef adapter_exits, at::IntArrayRef adapters, TensorList adapter_k,
    TensorList adapter_v) {
  CheckTensor("tokens", tokens, at::kLong, {kAny});
  const int64_t sequences = tokens.numel();
  CheckTensor("positions", positions, at::kLong, {sequences});
  CheckTensor("num_drafts", num_drafts, at::kLong, {sequences});
  TORCH_CHECK_VALUE(0 <= max_drafts && max_drafts <= kMaxSize, "max_drafts must be in 0..", kMaxSize, ", got ",
                    max_drafts);
  TORCH_CHECK_VALUE(1 <= num_cycles && num_cycles <= kMostCycles, "num_cycles must be in 1..", kMostCycles, ", got ",
                    num_cycles);
  const Ends ended(ends, sequences);
  TORCH_CHECK_VALUE(adapter_exits.size() == adapters.size() && adapters.size() == adapter_k.size() &&
                        adapter_k.size() == adapter_v.size(),
                    "adapter_exits, adapters, adapter_k and adapter_v must have one item for each adapter");
  Adapters for_drafts, for_verification;
  for (size_t i = 0; i < adapters.size(); ++i) {
    if (adapter_exits[i] <= exit_layer) for_drafts.Add(adapter_exits[i], adapters[i], adapter_k[i], adapter_v[i]);
    const bool attends = adapter_k[i].dim() > 0 && adapter_k[i].size(0) > 1;  // one alone has neither K nor V
    if (attends) for_verification.Add(adapter_exits[i], adapters[i], adapter_k[i], adapter_v[i]);
  }

  Tensor drafts = at::full({num_cycles, sequences, max_drafts}, -1, at::kLong);
  Tensor num_drafted = at::zeros({num_cycles, sequences}, at::kLong);
  Tensor confidences = at::zeros({num_cycles, sequences, max_drafts}, at::kFloat);
  Tensor num_accepted = at::zeros({num_cycles, sequences}, at::kLong);
  Tensor next_tokens = at::zeros({num_cycles, sequences}, at::kLong);
  Tensor seconds = at::zeros({num_cycles, 2}, at::kDouble);
  const Tensor judged = at::full({sequences}, true, at::kBool);

  Tensor last = tokens, first = positions.clone();
  int64_t done = 0;
  for (bool goes_on = true; goes_on && done < num_cycles; ++done) {
    const Clock::time_point begun = Clock::now();
    if (max_drafts > 0) {
      auto [drafted, counts, confidence, scores] = draft_pass(
          drafting, k_cache, v_cache, hidden_cache, last, first, num_drafts, block_table, draft_head, draft_ids, {},
          stops, exit_layer, max_drafts, false, for_drafts.exits, for_drafts.numbers, for_drafts.k, for_drafts.v);
      drafts[done].copy_(drafted);
      num_drafted[done].copy_(counts);
      confidences[done].copy_(confidence);
    }
    const double draft_seconds = SecondsSince(begun);
    const Tensor drafted = drafts[done], counts = num_drafted[done];
    const Pending pending(last, first, drafted, counts, exit_layer);
    auto [accepted, next, logits] = verify_pass(
        kept, k_cache, v_cache, hidden_cache, pending.tokens, pending.positions, pending.depths, pending.starts, counts,
        judged, block_table, for_verification.exits, for_verification.numbers, for_verification.k, for_verification.v);
    num_accepted[done].copy_(accepted);
    next_tokens[done].copy_(next);
    for (int64_t b = 0; b < sequences; ++b) {
      const int64_t right = accepted.const_data_ptr<int64_t>()[b];
      const int64_t* draft = drafted.const_data_ptr<int64_t>() + b * max_drafts;
      const auto ends_text = [&](int64_t token) { return ended.Has(b, token); };
      if (ends_text(next.const_data_ptr<int64_t>()[b]) || std::any_of(draft, draft + right, ends_text)) goes_on = false;
      first.mutable_data_ptr<int64_t>()[b] += right + 1;
    }
    last = next;
    double* second = seconds.mutable_data_ptr<double>() + 2 * done;
    second[0] = draft_seconds;
    second[1] = SecondsSince(begun) - draft_seconds;
  }
  return {drafts.narrow(0, 0, done),       num_drafted.narrow(0, 0, done), confidences.narrow(0, 0, done),
          num_accepted.narrow(0, 0, done), next_tokens.narrow(0, 0, done), seconds.narrow(0, 0, done)};
}

}  // namespace layerskip
