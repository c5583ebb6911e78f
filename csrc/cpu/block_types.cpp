#include "block_types.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "block_codes.h"

namespace layerskip {

namespace {

constexpr int kSubs = 8;  // blocks of 32 in one of 256

constexpr BlockLayout kLayouts[] = {
    {WeightType::kQ4_0, 32, 18, 18},   {WeightType::kQ4_1, 32, 20, 20},   {WeightType::kQ5_0, 32, 22, 22},
    {WeightType::kQ5_1, 32, 24, 24},   {WeightType::kQ8_0, 32, 34, 34},   {WeightType::kQ4K, 256, 144, 148},
    {WeightType::kQ5K, 256, 176, 180}, {WeightType::kQ6K, 256, 210, 210},
};

// The widths of an image's fields, in bytes. Codes are fields of four bytes, of four numbers that a dot product reads
// together: numbers 4 i .. 4 i + 3 in the lower halves, 16 + 4 i .. in the upper ones, and bits that do not fit before.
std::vector<int> Fields(WeightType type) {
  const auto with = [](std::vector<int> fields, int codes, int times = 1) {
    std::vector<int> all = fields;
    for (int i = 0; i < times; ++i) all.insert(all.end(), codes, 4);
    return all;
  };
  const auto super = [](std::vector<int> fields, int codes) {
    for (int sub = 0; sub < kSubs; ++sub) {
      fields.insert(fields.end(), {1, 1});
      fields.insert(fields.end(), codes, 4);
    }
    return fields;
  };
  switch (type) {
    case WeightType::kQ4_0:
      return with({2}, 4);
    case WeightType::kQ4_1:
      return with({2, 2}, 4);
    case WeightType::kQ5_0:
      return with({2}, 5);
    case WeightType::kQ5_1:
      return with({2, 2}, 5);
    case WeightType::kQ8_0:
      return with({2}, 8);
    case WeightType::kQ4K:
      return super({2, 2}, 4);
    case WeightType::kQ5K:
      return super({2, 2}, 5);
    default:
      return super({2}, 6);
  }
}

float Half(const uint8_t* bytes) {
  Float16 half;
  std::memcpy(&half, bytes, sizeof(half));
  return ToFloat(half);
}

// ---- a file's block -> its image ----

void SmallImage(const uint8_t* from, int scales, int bits, uint8_t* to) {
  std::copy_n(from, 2 * scales, to);
  const uint8_t* codes = from + 2 * scales;
  uint8_t u[kBlock];
  if (bits == 8) {
    for (int k = 0; k < kBlock; ++k) u[k] = codes[k] ^ 0x80;
  } else {
    uint32_t high = 0;
    if (bits == 5) {
      std::memcpy(&high, codes, sizeof(high));
      codes += sizeof(high);
    }
    for (int k = 0; k < kBlock; ++k)
      u[k] = static_cast<uint8_t>((k < 16 ? codes[k] & 15 : codes[k - 16] >> 4) | (high >> k & 1) << 4);
  }
  PutCodes(u, bits, to + 2 * scales);
}

void K45Image(const uint8_t* from, int bits, uint8_t* to) {
  std::copy_n(from, 4, to);
  const uint8_t *s = from + 4, *high = from + 16, *low = from + (bits == 5 ? 48 : 16);
  const int64_t sub_bytes = 2 + 4 * bits;
  for (int sub = 0; sub < kSubs; ++sub) {
    uint8_t* at = to + 4 + sub * sub_bytes;
    at[0] = sub < 4 ? s[sub] & 63 : (s[sub + 4] & 15) | s[sub - 4] >> 6 << 4;
    at[1] = sub < 4 ? s[sub + 4] & 63 : s[sub + 4] >> 4 | s[sub] >> 6 << 4;
    uint8_t u[kBlock];
    for (int k = 0; k < kBlock; ++k) {
      const uint8_t both = low[sub / 2 * 32 + k];
      u[k] = sub % 2 == 0 ? both & 15 : both >> 4;
      if (bits == 5) u[k] |= static_cast<uint8_t>((high[k] >> sub & 1) << 4);
    }
    PutCodes(u, bits, at + 2);
  }
}

void Q6Image(const uint8_t* from, uint8_t* to) {
  std::copy_n(from + 208, 2, to);
  for (int sub = 0; sub < kSubs; ++sub) {
    uint8_t* at = to + 2 + sub * 26;
    std::copy_n(from + 192 + 2 * sub, 2, at);
    const uint8_t *low = from + sub / 4 * 64 + sub % 2 * 32, *high = from + 128 + sub / 4 * 32;
    uint8_t u[kBlock];
    for (int k = 0; k < kBlock; ++k)
      u[k] = static_cast<uint8_t>((sub % 4 < 2 ? low[k] & 15 : low[k] >> 4) | (high[k] >> sub % 4 * 2 & 3) << 4);
    PutCodes(u, 6, at + 2);
  }
}

void ImageOf(WeightType type, const uint8_t* from, uint8_t* to) {
  switch (type) {
    case WeightType::kQ4_0:
      return SmallImage(from, 1, 4, to);
    case WeightType::kQ4_1:
      return SmallImage(from, 2, 4, to);
    case WeightType::kQ5_0:
      return SmallImage(from, 1, 5, to);
    case WeightType::kQ5_1:
      return SmallImage(from, 2, 5, to);
    case WeightType::kQ8_0:
      return SmallImage(from, 1, 8, to);
    case WeightType::kQ4K:
      return K45Image(from, 4, to);
    case WeightType::kQ5K:
      return K45Image(from, 5, to);
    default:
      return Q6Image(from, to);
  }
}

// ---- an image's block -> the numbers it stands for ----

void SmallNumbers(const uint8_t* image, int scales, int bits, int zero, float* out) {
  const float a = Half(image), c = scales == 2 ? -Half(image + 2) : 0.0f;
  uint8_t u[kBlock];
  GetCodes(image + 2 * scales, bits, u);
  for (int k = 0; k < kBlock; ++k) {
    out[k] = a * static_cast<float>(u[k] - zero);
    if (scales == 2) out[k] -= c;
  }
}

void SuperNumbers(const uint8_t* image, int bits, float* out) {
  const float d = Half(image), dmin = bits == 6 ? 0.0f : Half(image + 2);
  for (int sub = 0; sub < kSubs; ++sub) {
    const uint8_t* at = bits == 6 ? image + 2 + sub * 26 : image + 4 + sub * (2 + 4 * bits);
    uint8_t u[kBlock];
    GetCodes(at + 2, bits, u);
    for (int k = 0; k < kBlock; ++k) {
      float& value = out[sub * kBlock + k];
      if (bits == 6) {
        value = d * static_cast<float>(static_cast<int8_t>(at[k / 16])) * static_cast<float>(u[k] - 32);
      } else {
        value = d * static_cast<float>(at[0]) * static_cast<float>(u[k]) - dmin * static_cast<float>(at[1]);
      }
    }
  }
}

void NumbersOf(WeightType type, const uint8_t* image, float* out) {
  switch (type) {
    case WeightType::kQ4_0:
      return SmallNumbers(image, 1, 4, 8, out);
    case WeightType::kQ4_1:
      return SmallNumbers(image, 2, 4, 0, out);
    case WeightType::kQ5_0:
      return SmallNumbers(image, 1, 5, 16, out);
    case WeightType::kQ5_1:
      return SmallNumbers(image, 2, 5, 0, out);
    case WeightType::kQ8_0:
      return SmallNumbers(image, 1, 8, 128, out);
    case WeightType::kQ4K:
      return SuperNumbers(image, 4, out);
    case WeightType::kQ5K:
      return SuperNumbers(image, 5, out);
    default:
      return SuperNumbers(image, 6, out);
  }
}

// ---- images <-> lanes of a packed group ----

int64_t NumBlocks(const BlockLayout& layout, int64_t k) { return (k + layout.size - 1) / layout.size; }

// One lane of a packed block, as `move` copies its fields: move(a field of the group, of the image, its bytes).
template <class F>
void ForFields(const std::vector<int>& fields, int64_t lane, const F& move) {
  int64_t at = 0;
  for (const int width : fields) {
    move(at * kGroup + lane * width, at, width);
    at += width;
  }
}

// Types with scales of segments: where the code of number k of a lane in a plane, and the scale of segment s, stand in
// a group of `blocks` blocks.
int64_t CodeAt(int planes, int plane, int64_t k, int64_t lane) {
  return ((k / kBlock * planes + plane) * kBlock + k % kBlock / 4 * 4) * kGroup + lane * 4 + k % 4;
}
int64_t ScaleAt(int planes, int64_t blocks, int64_t s, int64_t lane) {
  return (blocks * planes * kBlock + s * static_cast<int64_t>(sizeof(float))) * kGroup +
         lane * static_cast<int64_t>(sizeof(float));
}

// A row's numbers are bytes (int8), or words of an upper byte and seven lower bits (int15); codes are unsigned.
void PackSegments(const uint8_t* rows, int planes, int64_t n, int64_t k, int64_t group, uint8_t* to) {
  const int64_t blocks = Blocks(k), code_bytes = blocks * kBlock * planes, row_bytes = code_bytes + kScaleBytes;
  for (int64_t lane = 0; lane < kGroup; ++lane) {
    const int64_t row = group * kGroup + lane;
    const uint8_t* from = row < n ? rows + row * row_bytes : nullptr;
    for (int64_t i = 0; i < blocks * kBlock; ++i) {
      to[CodeAt(planes, 0, i, lane)] = from == nullptr ? 0 : from[planes * i + planes - 1] ^ 0x80;
      if (planes == 2) to[CodeAt(planes, 1, i, lane)] = from == nullptr ? 0 : from[2 * i] & 127;
    }
    for (int64_t s = 0; s < kSegments; ++s) {
      uint8_t* scale = to + ScaleAt(planes, blocks, s, lane);
      std::memset(scale, 0, sizeof(float));
      if (from != nullptr) std::memcpy(scale, from + code_bytes + s * sizeof(float), sizeof(float));
    }
  }
}

}  // namespace

const BlockLayout* LayoutOf(WeightType type) {
  for (const BlockLayout& layout : kLayouts)
    if (layout.type == type) return &layout;
  return nullptr;
}

const BlockLayout* LayoutOfFileBytes(int64_t bytes) {
  for (const BlockLayout& layout : kLayouts)
    if (layout.file_bytes == bytes) return &layout;
  return nullptr;
}

const BlockLayout* LayoutOfPackedBytes(int64_t bytes) {
  for (const BlockLayout& layout : kLayouts)
    if (layout.image_bytes * kGroup == bytes) return &layout;
  return nullptr;
}

int64_t GroupBytes(WeightType type, int64_t k) {
  if (const int planes = WeightPlanes(type); planes > 0) return (Blocks(k) * kBlock * planes + kScaleBytes) * kGroup;
  const BlockLayout& layout = *LayoutOf(type);
  return NumBlocks(layout, k) * layout.image_bytes * kGroup;
}

void PackQuantised(WeightView weight, int64_t n, int64_t k, int64_t group_begin, int64_t group_end, void* packed) {
  const auto* rows = static_cast<const uint8_t*>(weight.data);
  const int64_t group_bytes = GroupBytes(weight.type, k);
  for (int64_t group = group_begin; group < group_end; ++group) {
    uint8_t* to = static_cast<uint8_t*>(packed) + group * group_bytes;
    if (const int planes = WeightPlanes(weight.type); planes > 0) {
      PackSegments(rows, planes, n, k, group, to);
      continue;
    }
    const BlockLayout& layout = *LayoutOf(weight.type);
    const std::vector<int> fields = Fields(weight.type);
    const int64_t blocks = NumBlocks(layout, k);
    std::vector<uint8_t> image(layout.image_bytes);
    for (int64_t lane = 0; lane < kGroup; ++lane) {
      const int64_t row = group * kGroup + lane;
      for (int64_t b = 0; b < blocks; ++b) {
        std::fill(image.begin(), image.end(), 0);
        if (row < n) ImageOf(weight.type, rows + (row * blocks + b) * layout.file_bytes, image.data());
        uint8_t* block = to + b * layout.image_bytes * kGroup;
        ForFields(fields, lane,
                  [&](int64_t at, int64_t from, int width) { std::memcpy(block + at, image.data() + from, width); });
      }
    }
  }
}

void CopyQuantisedRow(WeightView weight, int64_t row, int64_t k, int64_t to_row, void* packed) {
  const int64_t group_bytes = GroupBytes(weight.type, k), lane = row % kGroup, to_lane = to_row % kGroup;
  const uint8_t* from = static_cast<const uint8_t*>(weight.data) + row / kGroup * group_bytes;
  uint8_t* to = static_cast<uint8_t*>(packed) + to_row / kGroup * group_bytes;
  if (const int planes = WeightPlanes(weight.type); planes > 0) {
    const int64_t blocks = Blocks(k);
    for (int plane = 0; plane < planes; ++plane)
      for (int64_t i = 0; i < blocks * kBlock; ++i)
        to[CodeAt(planes, plane, i, to_lane)] = from[CodeAt(planes, plane, i, lane)];
    for (int64_t s = 0; s < kSegments; ++s)
      std::memcpy(to + ScaleAt(planes, blocks, s, to_lane), from + ScaleAt(planes, blocks, s, lane), sizeof(float));
    return;
  }
  const BlockLayout& layout = *LayoutOf(weight.type);
  const std::vector<int> fields = Fields(weight.type);
  for (int64_t b = 0; b < NumBlocks(layout, k); ++b) {
    const int64_t block = b * layout.image_bytes * kGroup;
    ForFields(fields, 0, [&](int64_t at, int64_t, int width) {
      std::memcpy(to + block + at + to_lane * width, from + block + at + lane * width, width);
    });
  }
}

void DequantiseRow(WeightView weight, int64_t row, int64_t k, float* out) {
  const int64_t lane = row % kGroup;
  const uint8_t* group = static_cast<const uint8_t*>(weight.data) + row / kGroup * GroupBytes(weight.type, k);
  if (const int planes = WeightPlanes(weight.type); planes > 0) {
    const int64_t blocks = Blocks(k), length = (blocks + kSegments - 1) / kSegments * kBlock;
    for (int64_t i = 0; i < k; ++i) {
      float scale;
      std::memcpy(&scale, group + ScaleAt(planes, blocks, i / length, lane), sizeof(scale));
      int q = group[CodeAt(planes, 0, i, lane)] - 128;
      if (planes == 2) q = 128 * q + group[CodeAt(planes, 1, i, lane)] - 64;
      out[i] = static_cast<float>(q) * scale;
    }
    return;
  }
  const BlockLayout& layout = *LayoutOf(weight.type);
  const std::vector<int> fields = Fields(weight.type);
  std::vector<uint8_t> image(layout.image_bytes);
  std::vector<float> numbers(layout.size);
  for (int64_t b = 0; b < NumBlocks(layout, k); ++b) {
    const uint8_t* block = group + b * layout.image_bytes * kGroup;
    ForFields(fields, lane,
              [&](int64_t at, int64_t to, int width) { std::memcpy(image.data() + to, block + at, width); });
    NumbersOf(weight.type, image.data(), numbers.data());
    std::copy_n(numbers.data(), std::min(layout.size, k - b * layout.size), out + b * layout.size);
  }
}

}  // namespace layerskip
