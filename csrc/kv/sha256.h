// SHA-256 (FIPS 180-4), so that page names cannot be made to collide.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace layerskip {

using Digest = std::array<uint8_t, 32>;

class Sha256 {
 public:
  void Update(const void* data, size_t size);
  void UpdateUint64(uint64_t value);  // eight bytes, the lowest first
  Digest Finish();                    // once, at the end

 private:
  void Compress(const uint8_t* block);

  // The first 32 bits of the fractional parts of the square roots of the first eight primes.
  std::array<uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<uint8_t, 64> buffer_;  // the bytes of a block not complete yet: size_ % 64 of them
  uint64_t size_ = 0;               // in bytes
};

}  // namespace layerskip
