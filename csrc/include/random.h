// Rule 7 of the arithmetic contract: random numbers that depend on nothing but what they are asked for.
//
// Torch-free, one body for every compiler, as contract.h.
#pragma once

#include <cstdint>

#include "contract.h"

namespace layerskip {

// The third word of a counter: what the numbers are for.
enum class Stream : uint32_t { kToken = 0, kAccept = 1, kResidual = 2 };

// What selects the random numbers of one row: the request's seed, the absolute position of the token to be chosen,
// their purpose, and which of a prompt's texts this is.
struct NoiseKey {
  uint64_t seed;
  uint32_t position;
  Stream stream;
  uint32_t sample;
};

namespace {

struct PhiloxWords {
  uint32_t w[4];
};

// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3; SC 2011).
LAYERSKIP_FN PhiloxWords Philox(PhiloxWords c, uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xd2511f53u} * c.w[0], product1 = uint64_t{0xcd9e8d57u} * c.w[2];
    c = {{static_cast<uint32_t>(product1 >> 32) ^ c.w[1] ^ key0, static_cast<uint32_t>(product1),
          static_cast<uint32_t>(product0 >> 32) ^ c.w[3] ^ key1, static_cast<uint32_t>(product0)}};
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
  return c;
}

// The four words of token ids 4 * block .. 4 * block + 3.
LAYERSKIP_FN PhiloxWords RandomWords(const NoiseKey& key, uint32_t block) {
  return Philox({{block, key.position, static_cast<uint32_t>(key.stream), key.sample}}, key.seed);
}

// 31 bits as a number in (0, 1].
LAYERSKIP_FN float UnitInterval(uint32_t word) {
  return (static_cast<float>(static_cast<int32_t>(word >> 1)) + 0.5f) * 0x1p-31f;
}

// -log(-log(1 - v)). The inner logarithm starts from v, not from 1 - v, where that is near 1: great noise, which
// decides, comes from small v and so keeps 31 bits of resolution.
LAYERSKIP_FN float Gumbel(uint32_t word) {
  constexpr float kLargest = 0x1.fffffep-1f;
  const float unit = UnitInterval(word);
  const float v = unit > kLargest ? kLargest : unit;
  LogParts parts = SplitForLog(BitCast<uint32_t>(1.0f - v));
  parts.f = parts.e == 0.0f ? -v : parts.f;
  return -LogOf(SplitForLog(BitCast<uint32_t>(-LogOf(parts))));  // 2^-32..17: none of the cases that Log minds
}

}  // namespace
}  // namespace layerskip
