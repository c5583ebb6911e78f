// A linear layer's products: its rows prepared, once for all the matrices that read them, and any columns of one
// matrix. Torch-free.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>

#include "kernels.h"
#include "parallel.h"

namespace layerskip {

// The most inputs of a linear layer that takes integers (rule 8), by how they are rounded; 0: none does.
struct IntegerSizes {
  int64_t most_inputs[kNumRoundings] = {};

  void Add(WeightView weight, int64_t inputs);
};

// fp32 scratch for a number of rows; it is not cleared.
class Buffer {
 public:
  explicit Buffer(int64_t n) : data_(new float[n > 0 ? n : 1]) {}
  operator float*() { return data_.get(); }
  operator const float*() const { return data_.get(); }

 private:
  std::unique_ptr<float[]> data_;
};

// Few rows are prepared for a phase by every thread for itself, which takes less time than to wait for one another.
inline constexpr int64_t kFewRows = 4;

// Memory for prepared rows: each thread's own for few, shared for more. The two lie apart, since a thread that comes
// late may still prepare a few rows for a phase that is over, while the others share more.
class PreparedRows {
 public:
  PreparedRows() : own_bytes_(0), shared_at_(0) {}
  // `few` and `many`: bytes of min(rows, kFewRows) rows and of all of them.
  PreparedRows(int64_t rows, int64_t few, int64_t many);
  // Where a thread writes and reads so many rows.
  char* Of(int64_t rows, int64_t rank) const {
    return data_.get() + (rows <= kFewRows ? rank * own_bytes_ : shared_at_);
  }

 private:
  int64_t own_bytes_, shared_at_;
  std::unique_ptr<char[]> data_;
};

// Of `size` fp32 values each.
PreparedRows PreparedFloats(int64_t rows, int64_t size);

// Memory for the rows of a linear layer as integers.
class IntegerBuffer {
 public:
  IntegerBuffer(const IntegerSizes& sizes, int64_t rows);
  void* Of(Rounding rounding, int64_t rows, int64_t rank) const {
    return memory_[static_cast<int>(rounding)].Of(rows, rank);
  }

 private:
  PreparedRows memory_[kNumRoundings];
};

// The rows that a linear layer reads, x [rows, size], and the same as integers where weights ask for them.
struct LinearInput {
  LinearInput(Team& team, const float* x, int64_t rows, int64_t size, std::initializer_list<WeightView> weights,
              const IntegerBuffer& buffer);
  const float* x;
  int64_t rows, size;
  const void* integers[kNumRoundings] = {};
};

// Rule 1 or 8 on columns 16 * group_begin .. min(16 * group_end, n) of out [rows, n], as one thread computes them.
void Linear(const Kernels& kernels, const LinearInput& input, WeightView weight, const void* bias, int64_t n,
            int64_t group_begin, int64_t group_end, bool round, float* out);

}  // namespace layerskip
