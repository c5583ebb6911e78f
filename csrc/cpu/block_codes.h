// The codes of 32 numbers: unsigned bytes, of which `bits` count, <-> the codes of an image (block_types.cpp).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "block_types.h"

namespace layerskip {

inline void PutCodes(const uint8_t* u, int bits, uint8_t* to) {
  if (bits == 8) {
    std::copy_n(u, kBlock, to);
    return;
  }
  const int planes = bits == 4 ? 0 : bits == 5 ? 1 : 2;
  std::memset(to, 0, 4 * planes);
  for (int k = 0; k < kBlock; ++k) {
    const int i = k / 4, j = k % 4;
    if (bits == 5) to[j] |= static_cast<uint8_t>((u[k] >> 4 & 1) << i);
    if (bits == 6) to[4 * (i / 4) + j] |= static_cast<uint8_t>((u[k] >> 4 & 3) << 2 * (i % 4));
  }
  for (int k = 0; k < 16; ++k) to[4 * planes + k] = static_cast<uint8_t>((u[k] & 15) | (u[16 + k] & 15) << 4);
}

inline void GetCodes(const uint8_t* from, int bits, uint8_t* u) {
  if (bits == 8) {
    std::copy_n(from, kBlock, u);
    return;
  }
  const int planes = bits == 4 ? 0 : bits == 5 ? 1 : 2;
  for (int k = 0; k < 16; ++k) {
    u[k] = from[4 * planes + k] & 15;
    u[16 + k] = from[4 * planes + k] >> 4;
  }
  for (int k = 0; k < kBlock; ++k) {
    const int i = k / 4, j = k % 4;
    if (bits == 5) u[k] |= static_cast<uint8_t>((from[j] >> i & 1) << 4);
    if (bits == 6) u[k] |= static_cast<uint8_t>((from[4 * (i / 4) + j] >> 2 * (i % 4) & 3) << 4);
  }
}

}  // namespace layerskip
