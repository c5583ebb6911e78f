// The types of quantised weights (rule 8), their packed layout, and moving rows of them about. Torch-free.
//
// A row in the order in which the kernels read it is an image: block after block, the fields of each in turn. Packed,
// sixteen rows lie together, field by field: 16 lanes of a scale, then of the next, then of four codes, ...
#pragma once

#include <cstdint>

#include "contract.h"

namespace layerskip {

inline constexpr int64_t kGroup = 16;  // output columns in a packed weight group
inline constexpr int64_t kBlock = 32;  // numbers that share a scale, of activations and (at most) of weights

// kDense: in the model's dtype. The others as reference.BLOCK_TYPES names them.
enum class WeightType { kDense, kInt8, kInt15, kQ4_0, kQ4_1, kQ5_0, kQ5_1, kQ8_0, kQ4K, kQ5K, kQ6K };

// A packed linear weight, or the embedding.
struct WeightView {
  const void* data;
  WeightType type;
};

// Planes of the types of our own, which have scales of segments; 0: of any other.
inline constexpr int WeightPlanes(WeightType type) {
  return type == WeightType::kInt8 ? 1 : type == WeightType::kInt15 ? 2 : 0;
}
// They end with those scales, fp32 [8 segments][16 columns] in a group: so many bytes of each row.
inline constexpr int64_t kScaleBytes = kSegments * static_cast<int64_t>(sizeof(float));

struct BlockLayout {
  WeightType type;
  int64_t size;         // numbers in a block
  int64_t file_bytes;   // of a block in a GGUF file
  int64_t image_bytes;  // of a block of one row in its image
};

// Of a type in blocks, by the type, or by the bytes of a block; null: there is none.
const BlockLayout* LayoutOf(WeightType type);
const BlockLayout* LayoutOfFileBytes(int64_t bytes);
const BlockLayout* LayoutOfPackedBytes(int64_t bytes);

inline int64_t Blocks(int64_t k) { return (k + kBlock - 1) / kBlock; }

// Bytes of one packed group of K inputs; not of a dense type.
int64_t GroupBytes(WeightType type, int64_t k);

// Row-major [N, ...] as reference lays it out -> packed groups group_begin .. group_end; missing rows are zeros.
void PackQuantised(WeightView weight, int64_t n, int64_t k, int64_t group_begin, int64_t group_end, void* packed);
// Row `row` of a packed weight becomes row `to_row` of another.
void CopyQuantisedRow(WeightView weight, int64_t row, int64_t k, int64_t to_row, void* packed);
// The k numbers of one row of a packed weight: fl(fl(a*q) - c).
void DequantiseRow(WeightView weight, int64_t row, int64_t k, float* out);

}  // namespace layerskip
