// How one row's token is drawn (rule 7), for the ops in sampling.cpp and for drafts.
#pragma once

#include <limits>
#include <memory>

#include "kernels.h"
#include "layers.h"

namespace layerskip {

inline constexpr float kNever = -std::numeric_limits<float>::infinity();  // the score of what is excluded

// Whether a row's greatest score is a choice: not NaN, not +inf, and not -inf as all others.
inline bool IsChoice(const Maximum& m) { return !m.has_nan && kNever < m.value && m.value < -kNever; }

// Raises RuntimeError where there was a row without a choice.
void CheckChoices(bool all_rows);

// What a thread needs for rows of n scores: allocated before the threads start, because they must not throw.
// Not initialised, so that what a row does not need costs nothing.
struct SamplingScratch {
  using Integers = std::unique_ptr<int64_t[]>;
  explicit SamplingScratch(int64_t n);
  Buffer a;
  Integers p, q, ids, sums;
};

// The settings of filter_logits for one row.
struct Filters {
  float temperature;
  int64_t top_k;
  double top_p;
  float min_p;
};

// What is left of a row of n scores. Returns whether there was something to choose.
bool FilterRow(const float* row, int64_t n, const Filters& filters, SamplingScratch& scratch, float* scores);

// argmax(scores + noise) of a row that has a choice.
int64_t Draw(const float* scores, int64_t n, const NoiseKey& key);

}  // namespace layerskip
