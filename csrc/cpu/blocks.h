// The kernels of rule 8 as a table of functions: one for each instruction set that multiplies integers in its own way,
// filled by blocks.inl. Torch-free and single-threaded.
#pragma once

#include <cstdint>

#include "block_types.h"

namespace layerskip {

// What the activations of a linear layer are rounded to: one plane of 7 bits or two with one scale for each block of
// 32, or two with one scale for each of the eight segments.
enum class Rounding { kOnePlane, kTwoPlanes, kTwoPlanesBySegment };
inline constexpr int kNumRoundings = 3;

// Not of a dense type.
inline constexpr Rounding RoundingOf(WeightType type) {
  if (WeightPlanes(type) > 0) return Rounding::kTwoPlanesBySegment;
  return type == WeightType::kQ8_0 ? Rounding::kTwoPlanes : Rounding::kOnePlane;
}

// A block of 32 activations of one row; `sums`: of the integers in its halves (one plane), or of each plane. The
// planes are those of X = 128 * planes[0] + planes[1].
template <int kPlanes>
struct alignas(16) IntegerBlock {
  int8_t planes[kPlanes][kBlock];
  float scale;
  int32_t sums[2];
};

// Rows as integers: in tiles of kTileRows, and in a tile block by block, so that what is multiplied together lies
// together. Fewer rows than that are one tile of just so many.
template <int kPlanes>
inline constexpr int64_t kTileRows = kPlanes == 1 ? 12 : 8;

template <int kPlanes>
struct IntegerRows {
  IntegerBlock<kPlanes>* data;
  int64_t rows, blocks;

  int64_t TileRows() const { return rows < kTileRows<kPlanes> ? rows : kTileRows<kPlanes>; }
  IntegerBlock<kPlanes>* At(int64_t row, int64_t block) const {
    return data + ((row / TileRows()) * blocks + block) * TileRows() + row % TileRows();
  }
};

// Bytes that `rows` rows of k inputs take.
inline int64_t IntegerBytes(Rounding rounding, int64_t rows, int64_t k) {
  const bool one = rounding == Rounding::kOnePlane;
  const int64_t most = one ? kTileRows<1> : kTileRows<2>, tile = rows < 1 ? 1 : rows < most ? rows : most;
  const auto block = static_cast<int64_t>(one ? sizeof(IntegerBlock<1>) : sizeof(IntegerBlock<2>));
  return (rows + tile - 1) / tile * tile * Blocks(k) * block;
}

struct BlockKernels {
  // Rows row_begin .. row_end of x [rows, k] -> integers in `out`, which has room for all rows.
  void (*round_rows)(Rounding rounding, const float* x, int64_t rows, int64_t k, int64_t row_begin, int64_t row_end,
                     void* out);
  // Rule 8 up to the bias, for columns 16 * group_begin .. min(16 * group_end, n) of out [rows, n].
  void (*dot)(const void* integers, int64_t rows, int64_t k, WeightView weight, int64_t n, int64_t group_begin,
              int64_t group_end, float* out);
};

}  // namespace layerskip
