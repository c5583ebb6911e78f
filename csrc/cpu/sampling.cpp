// Rule 7's ops: random words, noise, filters, and the two ways to choose a token. Each row is one thread's work and
// knows nothing of the others.
#include "sampling.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "checks.h"
#include "ops.h"
#include "parallel.h"

namespace layerskip {

namespace {

constexpr int64_t kBuckets = 4096;  // of scores, to find a filter's cut: 64 per unit
constexpr float kBucketsPerUnit = 64.0f;

const Kernels& SamplingKernels() { return KernelsFor(Dtype::kFloat32); }

// A row's greatest score.
Maximum Greatest(const float* scores, int64_t n) { return SamplingKernels().argmax(scores, n); }

// Calls choose(row, scratch), which says whether there was something to choose, for all rows on all threads.
template <class F>
void ForRows(int64_t rows, int64_t n, const F& choose) {
  std::vector<SamplingScratch> scratch;
  for (int64_t i = 0; i < std::min(rows, NumThreads()); ++i) scratch.emplace_back(n);
  std::atomic<bool> all_rows{true};
  InParallel([&](const Team& team) {
    const auto threads = std::min(team.size, static_cast<int64_t>(scratch.size()));
    for (int64_t r = team.rank; team.rank < threads && r < rows; r += threads)
      if (!choose(r, scratch[team.rank])) all_rows = false;
  });
  CheckChoices(all_rows);
}

// ---- filters ----

// The last token that a filter keeps. Tokens are ordered by falling score, then rising id.
struct Cut {
  float score;
  int64_t id;
  bool Keeps(float s, int64_t i) const { return s > score || (s == score && i <= id); }
};

// The cut after the first tokens whose weights reach `limit`. Integer weights: their sums need no order. Sorts only
// the narrow range of scores in which the cut lies.
template <class Weight>
Cut FindCut(const float* scores, int64_t n, float maximum, const Weight& weight, int64_t limit,
            SamplingScratch& scratch) {
  const auto bucket_of = [&](float score) {
    const float distance = (maximum - score) * kBucketsPerUnit;  // rises as scores fall, so buckets keep the order
    return distance < static_cast<float>(kBuckets - 1) ? static_cast<int64_t>(distance) : kBuckets - 1;
  };
  std::fill_n(scratch.sums.get(), kBuckets, 0);
  for (int64_t i = 0; i < n; ++i) scratch.sums[bucket_of(scores[i])] += weight(i);
  int64_t bucket = 0, before = 0;
  while (bucket < kBuckets && before + scratch.sums[bucket] < limit) before += scratch.sums[bucket++];
  int64_t* end = scratch.ids.get();
  for (int64_t i = 0; i < n; ++i)
    if (bucket_of(scores[i]) == bucket) *end++ = i;
  std::sort(scratch.ids.get(), end,
            [&](int64_t a, int64_t b) { return scores[a] > scores[b] || (scores[a] == scores[b] && a < b); });
  for (const int64_t* id = scratch.ids.get(); id != end; ++id) {
    before += weight(*id);
    if (before >= limit) return {scores[*id], *id};
  }
  return {kNever, n};
}

int64_t Mass(float probability) { return static_cast<int64_t>(probability * kMassOne); }

}  // namespace

SamplingScratch::SamplingScratch(int64_t n)
    : a(n), p(new int64_t[n]), q(new int64_t[n]), ids(new int64_t[n]), sums(new int64_t[kBuckets]) {}

bool FilterRow(const float* row, int64_t n, const Filters& filters, SamplingScratch& scratch, float* scores) {
  const auto& [temperature, top_k, top_p, min_p] = filters;
  const Kernels& kernels = SamplingKernels();
  if (temperature == 0.0f) {
    std::copy_n(row, n, scores);
    return true;
  }
  kernels.divide(row, n, temperature, scores);
  const Maximum greatest = Greatest(scores, n);
  if (!IsChoice(greatest)) return false;
  const bool cuts = top_k > 0 && top_k < n;
  if (!cuts && top_p >= 1.0 && min_p <= 0.0f) return true;
  Cut cut{kNever, n};
  const auto find_cut = [&](const auto& weight, int64_t limit) {
    cut = FindCut(scores, n, greatest.value, weight, limit, scratch);
  };
  if (cuts) find_cut([](int64_t) { return int64_t{1}; }, top_k);
  const float* probability = scratch.a;  // of the likeliest's
  if (top_p < 1.0 || min_p > 0.0f) kernels.exp_from(scores, n, greatest.value, scratch.a);
  if (top_p < 1.0) {
    int64_t total = 0;
    for (int64_t i = 0; i < n; ++i) total += scratch.p[i] = cut.Keeps(scores[i], i) ? Mass(probability[i]) : 0;
    const double limit = std::ceil(top_p * static_cast<double>(total));
    find_cut([&](int64_t i) { return scratch.p[i]; }, std::max<int64_t>(1, static_cast<int64_t>(limit)));
  }
  for (int64_t i = 0; i < n; ++i)
    if (!cut.Keeps(scores[i], i) || (min_p > 0.0f && probability[i] < min_p)) scores[i] = kNever;
  return true;
}

// ---- choices ----

int64_t Draw(const float* scores, int64_t n, const NoiseKey& key) {
  return SamplingKernels().gumbel_argmax(scores, n, key, Greatest(scores, n).index);
}

void CheckChoices(bool all_rows) {
  TORCH_CHECK(all_rows,
              "no token can be chosen: a score is NaN or +infinite, or all are -infinite. The logits overflowed, or "
              "every token was excluded: check temperature, penalties and logit_bias");
}

namespace {

// Probabilities as integers; returns their sum, which is exact in any order.
double Masses(const float* scores, int64_t n, float maximum, float* probabilities, int64_t* masses) {
  SamplingKernels().exp_from(scores, n, maximum, probabilities);
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += masses[i] = Mass(probabilities[i]);
  return static_cast<double>(total);
}

// The rejection rule on one row; returns -1 where there is nothing to choose.
int64_t KeepOrRedraw(const float* draft_scores, const float* scores, int64_t n, int64_t draft, NoiseKey key,
                     SamplingScratch& scratch) {
  const Maximum q_greatest = Greatest(draft_scores, n), p_greatest = Greatest(scores, n);
  if (!IsChoice(q_greatest) || !IsChoice(p_greatest)) return -1;
  const double q_total = Masses(draft_scores, n, q_greatest.value, scratch.a, scratch.q.get());
  const double p_total = Masses(scores, n, p_greatest.value, scratch.a, scratch.p.get());
  const auto q = [&](int64_t i) { return static_cast<double>(scratch.q[i]) / q_total; };
  const auto p = [&](int64_t i) { return static_cast<double>(scratch.p[i]) / p_total; };
  key.stream = Stream::kAccept;
  const double u = (static_cast<double>(RandomWords(key, 0).w[0] >> 1) + 0.5) * 0x1p-31;
  if (u * q(draft) < p(draft)) return draft;
  float* residual = scratch.a;
  bool any = false;
  for (int64_t i = 0; i < n; ++i) {
    residual[i] = static_cast<float>(std::max(p(i) - q(i), 0.0));
    any |= residual[i] > 0.0f;
  }
  SamplingKernels().log(residual, n, residual);
  key.stream = Stream::kResidual;
  // Nothing is left only where p and q are equal up to rounding.
  return Draw(any ? residual : scores, n, key);
}

// positions, seeds and samples of the rows: what selects their noise.
class NoiseKeys {
 public:
  NoiseKeys(const Tensor& positions, const Tensor& seeds, const Tensor& samples, int64_t rows) {
    CheckTensor("positions", positions, at::kLong, {rows});
    CheckTensor("seeds", seeds, at::kLong, {rows});
    CheckTensor("samples", samples, at::kLong, {rows});
    positions_ = positions.const_data_ptr<int64_t>();
    seeds_ = seeds.const_data_ptr<int64_t>();
    samples_ = samples.const_data_ptr<int64_t>();
    CheckRange("positions", positions_, rows, 0, int64_t{1} << 32);
    CheckRange("samples", samples_, rows, 0, int64_t{1} << 32);
  }
  NoiseKey operator[](int64_t row) const {
    return {static_cast<uint64_t>(seeds_[row]), static_cast<uint32_t>(positions_[row]), Stream::kToken,
            static_cast<uint32_t>(samples_[row])};
  }

 private:
  const int64_t *positions_, *seeds_, *samples_;
};

void CheckScores(const Tensor& scores) {
  CheckTensor("scores", scores, at::kFloat, {kAny, kAny});
  TORCH_CHECK_VALUE(scores.size(1) >= 1, "scores must have at least one column, a token to choose");
}

}  // namespace

Tensor philox(const Tensor& counters, int64_t seed) {
  CheckTensor("counters", counters, at::kLong, {kAny, 4});
  Tensor words = at::empty_like(counters);
  const int64_t* from = counters.const_data_ptr<int64_t>();
  int64_t* to = words.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < counters.numel(); i += 4) {
    PhiloxWords c;
    for (int w = 0; w < 4; ++w) c.w[w] = static_cast<uint32_t>(from[i + w]);
    c = Philox(c, static_cast<uint64_t>(seed));
    for (int w = 0; w < 4; ++w) to[i + w] = c.w[w];
  }
  return words;
}

Tensor gumbel(const Tensor& words) {
  CheckTensor("words", words, at::kLong, {kAny});
  const int64_t* from = words.const_data_ptr<int64_t>();
  const std::vector<uint32_t> low(from, from + words.numel());
  Tensor noise = at::empty(words.sizes(), at::kFloat);
  SamplingKernels().gumbel(low.data(), words.numel(), noise.mutable_data_ptr<float>());
  return noise;
}

Tensor filter_logits(const Tensor& scores, const Tensor& temperatures, const Tensor& top_ks, const Tensor& top_ps,
                     const Tensor& min_ps) {
  CheckScores(scores);
  const int64_t rows = scores.size(0), n = scores.size(1);
  CheckTensor("temperatures", temperatures, at::kFloat, {rows});
  CheckTensor("top_ks", top_ks, at::kLong, {rows});
  CheckTensor("top_ps", top_ps, at::kDouble, {rows});
  CheckTensor("min_ps", min_ps, at::kFloat, {rows});
  const float* score = scores.const_data_ptr<float>();
  const float *temperature = temperatures.const_data_ptr<float>(), *min_p = min_ps.const_data_ptr<float>();
  const int64_t* top_k = top_ks.const_data_ptr<int64_t>();
  CheckRange("top_ks", top_k, rows, 0, std::numeric_limits<int64_t>::max());
  const double* top_p = top_ps.const_data_ptr<double>();
  Tensor filtered = at::empty_like(scores);
  float* out = filtered.mutable_data_ptr<float>();
  ForRows(rows, n, [&](int64_t r, SamplingScratch& scratch) {
    return FilterRow(score + r * n, n, {temperature[r], top_k[r], top_p[r], min_p[r]}, scratch, out + r * n);
  });
  return filtered;
}

Tensor gumbel_argmax(const Tensor& scores, const Tensor& positions, const Tensor& seeds, const Tensor& samples,
                     const Tensor& noisy) {
  CheckScores(scores);
  const int64_t rows = scores.size(0), n = scores.size(1);
  CheckTensor("noisy", noisy, at::kBool, {rows});
  const NoiseKeys keys(positions, seeds, samples, rows);
  const float* score = scores.const_data_ptr<float>();
  const bool* noise = noisy.const_data_ptr<bool>();
  Tensor tokens = at::empty({rows}, at::kLong);
  int64_t* token = tokens.mutable_data_ptr<int64_t>();
  ForRows(rows, n, [&](int64_t r, SamplingScratch&) {
    const Maximum greatest = Greatest(score + r * n, n);
    const bool choice = IsChoice(greatest);
    token[r] = choice && noise[r] ? SamplingKernels().gumbel_argmax(score + r * n, n, keys[r], greatest.index)
                                  : greatest.index;
    return choice;
  });
  return tokens;
}

Tensor rejection_sample(const Tensor& draft_scores, const Tensor& scores, const Tensor& drafts, const Tensor& positions,
                        const Tensor& seeds, const Tensor& samples) {
  CheckScores(scores);
  const int64_t rows = scores.size(0), n = scores.size(1);
  CheckTensor("draft_scores", draft_scores, at::kFloat, {rows, n});
  CheckTensor("drafts", drafts, at::kLong, {rows});
  const int64_t* draft = drafts.const_data_ptr<int64_t>();
  CheckRange("drafts", draft, rows, 0, n);
  const NoiseKeys keys(positions, seeds, samples, rows);
  const float *q = draft_scores.const_data_ptr<float>(), *p = scores.const_data_ptr<float>();
  Tensor tokens = at::empty({rows}, at::kLong);
  int64_t* token = tokens.mutable_data_ptr<int64_t>();
  ForRows(rows, n, [&](int64_t r, SamplingScratch& scratch) {
    token[r] = KeepOrRedraw(q + r * n, p + r * n, n, draft[r], keys[r], scratch);
    return token[r] >= 0;
  });
  return tokens;
}

}  // namespace layerskip
