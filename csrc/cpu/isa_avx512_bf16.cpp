// The bf16 kernels for AVX-512 with BF16 and VBMI, and whether this machine's vdpbf16ps is the one that they expect.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,avx2,fma,f16c")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 sees its own _mm512_undefined_ps() ...
#pragma GCC diagnostic ignored "-Wuninitialized"        // ... and _mm256_undefined_si256()
#define LAYERSKIP_AVX512
#define LAYERSKIP_AVX512_BF16
#include "kernels.inl"

namespace layerskip {
const Kernels* Avx512Bf16Kernels() { return kTables; }

// The manual says upper half first and a rounding after each sum, and that is what gives the contract's bits. So does
// this: 1 + 2^24 is rounded to 2^24. Any other order, or one rounding for both, leaves 1.
bool PairsAreFoldedInOrder() {
  const float numbers[] = {0x1p12f, -0x1p12f}, others[] = {0x1p12f, 0x1p12f};
  uint32_t a, b;
  MakePairs(numbers, 2, &a);
  MakePairs(others, 2, &b);
  float sums[kLanes];
  Store(sums,
        AddPairs(Broadcast(1.0f), _mm512_set1_epi32(static_cast<int>(a)), _mm512_set1_epi32(static_cast<int>(b))));
  return sums[0] == 0.0f;
}
}  // namespace layerskip
#endif
