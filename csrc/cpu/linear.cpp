#include "linear.h"

#include <algorithm>

namespace layerskip {

void IntegerSizes::Add(WeightView weight, int64_t inputs) {
  if (weight.type == WeightType::kDense) return;
  int64_t& most = most_inputs[static_cast<int>(RoundingOf(weight.type))];
  most = std::max(most, inputs);
}

PreparedRows::PreparedRows(int64_t rows, int64_t few, int64_t many)
    : own_bytes_((few + 63) / 64 * 64),
      shared_at_(own_bytes_ * NumThreads()),
      data_(new char[shared_at_ + (rows > kFewRows ? many : 0)]) {}

PreparedRows PreparedFloats(int64_t rows, int64_t size) {
  const auto bytes = size * static_cast<int64_t>(sizeof(float));
  return {rows, std::min(rows, kFewRows) * bytes, rows * bytes};
}

IntegerBuffer::IntegerBuffer(const IntegerSizes& sizes, int64_t rows) {
  for (int i = 0; i < kNumRoundings; ++i) {
    const auto bytes = [&](int64_t count) {
      return IntegerBytes(static_cast<Rounding>(i), count, sizes.most_inputs[i]);
    };
    memory_[i] = PreparedRows(rows, bytes(std::min(rows, kFewRows)), bytes(rows));
  }
}

LinearInput::LinearInput(Team& team, const float* x, int64_t rows, int64_t size,
                         std::initializer_list<WeightView> weights, const IntegerBuffer& buffer)
    : x(x), rows(rows), size(size) {
  for (const WeightView weight : weights) {
    if (weight.type == WeightType::kDense) continue;
    const Rounding rounding = RoundingOf(weight.type);
    const void*& made = integers[static_cast<int>(rounding)];
    if (made != nullptr) continue;
    void* out = buffer.Of(rounding, rows, team.rank);
    const BlockKernels& blocks = CurrentBlockKernels();
    const auto round = [&](int64_t begin, int64_t end) { blocks.round_rows(rounding, x, rows, size, begin, end, out); };
    if (rows <= kFewRows) {
      round(0, rows);
    } else {
      team.ForEach(rows, 1, round);
    }
    made = out;
  }
}

void Linear(const Kernels& kernels, const LinearInput& input, WeightView weight, const void* bias, int64_t n,
            int64_t group_begin, int64_t group_end, bool round, float* out) {
  if (weight.type == WeightType::kDense) {
    kernels.linear(input.x, input.rows, input.size, weight.data, bias, n, group_begin, group_end, round, out);
    return;
  }
  const void* integers = input.integers[static_cast<int>(RoundingOf(weight.type))];
  CurrentBlockKernels().dot(integers, input.rows, input.size, weight, n, group_begin, group_end, out);
  if (bias != nullptr || round) kernels.finish(bias, input.rows, n, group_begin, group_end, round, out);
}

}  // namespace layerskip
