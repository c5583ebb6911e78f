// Bias, penalties and a least length on a row of logits, for edit_logits and for drafts.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace layerskip {

// A row of scores: of all tokens, or of those of a draft vocabulary.
struct TokenScores {
  float* scores;
  int64_t size;
  const int64_t* ids;  // [size], ascending; null: score n is token n's
};

// LogitEdits.flat of layerskip_kernels/operands.py: the edits of each sequence.
class LogitEdits {
 public:
  // Checks them; an empty list is none. The tensors must outlive the view.
  LogitEdits(at::TensorList edits, int64_t sequences, int64_t vocab_size);

  // Whether sequence b has any.
  bool Changes(int64_t b) const;

  // Edits the scores of the token at a position of sequence b, after `count` drafted tokens that are not listed.
  void Apply(const TokenScores& row, int64_t b, int64_t position, const int64_t* drafted, int64_t count) const;

 private:
  // How a token is listed.
  struct Entry {
    float bias;
    int64_t count;
    bool ends;
  };
  float Edited(float score, const Entry& entry, int64_t times, int64_t b, int64_t position) const;

  bool any_;
  int64_t listed_ = 0;  // per sequence
  const float *repetitions_ = nullptr, *frequencies_ = nullptr, *presences_ = nullptr, *biases_ = nullptr;
  const int64_t *least_positions_ = nullptr, *ids_ = nullptr, *counts_ = nullptr;
  const bool* ends_ = nullptr;
};

}  // namespace layerskip
