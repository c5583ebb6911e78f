#include "edits.h"

#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <limits>

#include "checks.h"
#include "ops.h"
#include "parallel.h"

namespace layerskip {

LogitEdits::LogitEdits(at::TensorList edits, int64_t sequences, int64_t vocab_size) : any_(!edits.empty()) {
  if (!any_) return;
  TORCH_CHECK_VALUE(edits.size() == 8, "edits must hold 8 tensors or none, got ", edits.size());
  CheckTensor("repetitions", edits[0], at::kFloat, {sequences});
  CheckTensor("frequencies", edits[1], at::kFloat, {sequences});
  CheckTensor("presences", edits[2], at::kFloat, {sequences});
  CheckTensor("least_positions", edits[3], at::kLong, {sequences});
  CheckTensor("edited ids", edits[4], at::kLong, {sequences, kAny});
  listed_ = edits[4].size(1);
  CheckTensor("biases", edits[5], at::kFloat, {sequences, listed_});
  CheckTensor("counts", edits[6], at::kLong, {sequences, listed_});
  CheckTensor("ends", edits[7], at::kBool, {sequences, listed_});
  repetitions_ = edits[0].const_data_ptr<float>();
  frequencies_ = edits[1].const_data_ptr<float>();
  presences_ = edits[2].const_data_ptr<float>();
  least_positions_ = edits[3].const_data_ptr<int64_t>();
  ids_ = edits[4].const_data_ptr<int64_t>();
  biases_ = edits[5].const_data_ptr<float>();
  counts_ = edits[6].const_data_ptr<int64_t>();
  ends_ = edits[7].const_data_ptr<bool>();
  CheckRange("edited ids", ids_, sequences * listed_, -1, vocab_size);
  CheckRange("counts", counts_, sequences * listed_, -1, int64_t{1} << 32);
}

bool LogitEdits::Changes(int64_t b) const {
  if (!any_) return false;
  const int64_t* ids = ids_ + b * listed_;
  return repetitions_[b] != 1.0f || frequencies_[b] != 0.0f || presences_[b] != 0.0f ||
         std::any_of(ids, ids + listed_, [](int64_t id) { return id >= 0; });
}

float LogitEdits::Edited(float score, const Entry& entry, int64_t times, int64_t b, int64_t position) const {
  score += entry.bias;
  if (entry.count >= 0 || times > 0) score = score < 0.0f ? score * repetitions_[b] : score / repetitions_[b];
  const int64_t generated = std::max<int64_t>(entry.count, 0) + times;
  if (generated > 0) score = (score - frequencies_[b] * static_cast<float>(generated)) - presences_[b];
  if (entry.ends && position < least_positions_[b]) score = -std::numeric_limits<float>::infinity();
  return score;
}

void LogitEdits::Apply(const TokenScores& row, int64_t b, int64_t position, const int64_t* drafted,
                       int64_t count) const {
  const auto edit = [&](int64_t id, const Entry& entry) {
    int64_t column = id;
    if (row.ids != nullptr) {
      const int64_t* found = std::lower_bound(row.ids, row.ids + row.size, id);
      if (found == row.ids + row.size || *found != id) return;
      column = found - row.ids;
    }
    float& score = row.scores[column];
    score = Edited(score, entry, std::count(drafted, drafted + count, id), b, position);
  };
  const int64_t *ids = ids_ + b * listed_, *ids_end = ids + listed_;
  for (int64_t e = 0; e < listed_; ++e)
    if (ids[e] >= 0) edit(ids[e], {biases_[b * listed_ + e], counts_[b * listed_ + e], ends_[b * listed_ + e]});
  for (int64_t i = 0; i < count; ++i) {
    const bool first = std::find(drafted, drafted + i, drafted[i]) == drafted + i;
    if (first && std::find(ids, ids_end, drafted[i]) == ids_end) edit(drafted[i], {-0.0f, -1, false});
  }
}

Tensor edit_logits(const Tensor& logits, const Tensor& sequences, const Tensor& positions, const Tensor& preceding,
                   TensorList edits) {
  CheckTensor("logits", logits, at::kFloat, {kAny, kAny});
  const int64_t rows = logits.size(0), n = logits.size(1);
  CheckTensor("sequences", sequences, at::kLong, {rows});
  CheckTensor("positions", positions, at::kLong, {rows});
  CheckTensor("preceding", preceding, at::kLong, {rows, kAny});
  TORCH_CHECK_VALUE(!edits.empty() && edits[0].dim() == 1, "edits must begin with one penalty for each sequence");
  const int64_t num_sequences = edits[0].size(0), most = preceding.size(1);
  const int64_t *sequence = sequences.const_data_ptr<int64_t>(), *position = positions.const_data_ptr<int64_t>(),
                *before = preceding.const_data_ptr<int64_t>();
  CheckRange("sequences", sequence, rows, 0, num_sequences);
  CheckRange("preceding", before, rows * most, -1, n);
  const LogitEdits checked(edits, num_sequences, n);
  Tensor edited = at::empty_like(logits);
  const float* from = logits.const_data_ptr<float>();
  float* to = edited.mutable_data_ptr<float>();
  InParallel([&](const Team& team) {
    for (int64_t r = team.rank; r < rows; r += team.size) {
      std::copy_n(from + r * n, n, to + r * n);
      const int64_t* drafted = before + r * most;
      const int64_t count = std::find(drafted, drafted + most, -1) - drafted;
      checked.Apply({to + r * n, n, nullptr}, sequence[r], position[r], drafted, count);
    }
  });
  return edited;
}

}  // namespace layerskip
