// The bodies of blocks.h, compiled once per instruction set: see isa_*.cpp. Sums of integers are exact in any order, so
// only what is done to them in fp32 reads like its line in layerskip_kernels/ops/reference/blocks.py.
//
// LAYERSKIP_VNNI, in addition to one of simd.h's names: vpdpbusd multiplies.

#include "blocks.h"
#include "simd.h"

namespace layerskip {
namespace {

// ---- 64 bytes of codes: four of each of 16 columns; and sixteen int32 sums ----

#if defined(LAYERSKIP_AVX512)

struct Codes {
  __m512i v;
};
struct I32x16 {
  __m512i v;
};
LAYERSKIP_FN Codes LoadCodes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
LAYERSKIP_FN Codes And(Codes a, int byte) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(static_cast<char>(byte)))}; }
LAYERSKIP_FN Codes Or(Codes a, Codes b) { return {_mm512_or_si512(a.v, b.v)}; }
// Bits that cross from byte to byte are masked away by the caller.
template <int kBy>
LAYERSKIP_FN Codes ShiftUp(Codes a) {
  if constexpr (kBy >= 0) return {_mm512_slli_epi16(a.v, kBy)};
  return {_mm512_srli_epi16(a.v, kBy < 0 ? -kBy : 0)};
}
LAYERSKIP_FN I32x16 ZeroSums() { return {_mm512_setzero_si512()}; }
LAYERSKIP_FN I32x16 BroadcastInt(int32_t x) { return {_mm512_set1_epi32(x)}; }
LAYERSKIP_FN I32x16 Sub(I32x16 a, I32x16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
LAYERSKIP_FN I32x16 AddInts(I32x16 a, I32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
LAYERSKIP_FN I32x16 Times128(I32x16 a) { return {_mm512_slli_epi32(a.v, 7)}; }
LAYERSKIP_FN F32x16 ToFloats(I32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
LAYERSKIP_FN F32x16 LoadUnsigned(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
#if !defined(LAYERSKIP_VNNI)
LAYERSKIP_FN __m512i Pairs(Codes u, int32_t x) { return _mm512_maddubs_epi16(u.v, _mm512_set1_epi32(x)); }
#endif

#elif defined(LAYERSKIP_AVX2)

struct Codes {
  __m256i low, high;
};
struct I32x16 {
  __m256i low, high;
};
LAYERSKIP_FN Codes LoadCodes(const uint8_t* p) {
  const auto* halves = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}
LAYERSKIP_FN Codes And(Codes a, int byte) {
  const __m256i mask = _mm256_set1_epi8(static_cast<char>(byte));
  return {_mm256_and_si256(a.low, mask), _mm256_and_si256(a.high, mask)};
}
LAYERSKIP_FN Codes Or(Codes a, Codes b) { return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)}; }
template <int kBy>
LAYERSKIP_FN Codes ShiftUp(Codes a) {
  if constexpr (kBy >= 0) return {_mm256_slli_epi16(a.low, kBy), _mm256_slli_epi16(a.high, kBy)};
  return {_mm256_srli_epi16(a.low, kBy < 0 ? -kBy : 0), _mm256_srli_epi16(a.high, kBy < 0 ? -kBy : 0)};
}
LAYERSKIP_FN I32x16 ZeroSums() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
LAYERSKIP_FN I32x16 BroadcastInt(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
LAYERSKIP_FN I32x16 Sub(I32x16 a, I32x16 b) {
  return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)};
}
LAYERSKIP_FN I32x16 AddInts(I32x16 a, I32x16 b) {
  return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}
LAYERSKIP_FN I32x16 Times128(I32x16 a) { return {_mm256_slli_epi32(a.low, 7), _mm256_slli_epi32(a.high, 7)}; }
LAYERSKIP_FN F32x16 ToFloats(I32x16 a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
LAYERSKIP_FN F32x16 LoadUnsigned(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
}

#else

struct Codes {
  uint8_t v[64];
};
struct I32x16 {
  int32_t v[kLanes];
};
LAYERSKIP_FN Codes LoadCodes(const uint8_t* p) {
  Codes a;
  __builtin_memcpy(a.v, p, sizeof(a.v));
  return a;
}
LAYERSKIP_FN Codes And(Codes a, int byte) {
  for (uint8_t& v : a.v) v &= static_cast<uint8_t>(byte);
  return a;
}
LAYERSKIP_FN Codes Or(Codes a, Codes b) {
  for (int i = 0; i < 64; ++i) a.v[i] |= b.v[i];
  return a;
}
template <int kBy>
LAYERSKIP_FN Codes ShiftUp(Codes a) {
  for (uint8_t& v : a.v) v = static_cast<uint8_t>(kBy >= 0 ? v << (kBy < 0 ? 0 : kBy) : v >> (kBy < 0 ? -kBy : 0));
  return a;
}
template <class F>
LAYERSKIP_FN I32x16 Ints(F f) {
  I32x16 a;
  for (int i = 0; i < kLanes; ++i) a.v[i] = f(i);
  return a;
}
LAYERSKIP_FN I32x16 ZeroSums() {
  return Ints([](int) { return 0; });
}
LAYERSKIP_FN I32x16 BroadcastInt(int32_t x) {
  return Ints([=](int) { return x; });
}
// Unsigned: sums before the codes' zero is taken away may pass 2^31 and come back.
LAYERSKIP_FN int32_t Wrapped(uint32_t x) { return static_cast<int32_t>(x); }
LAYERSKIP_FN I32x16 Sub(I32x16 a, I32x16 b) {
  return Ints([&](int i) { return Wrapped(static_cast<uint32_t>(a.v[i]) - static_cast<uint32_t>(b.v[i])); });
}
LAYERSKIP_FN I32x16 AddInts(I32x16 a, I32x16 b) {
  return Ints([&](int i) { return Wrapped(static_cast<uint32_t>(a.v[i]) + static_cast<uint32_t>(b.v[i])); });
}
LAYERSKIP_FN I32x16 Times128(I32x16 a) {
  return Ints([&](int i) { return Wrapped(static_cast<uint32_t>(a.v[i]) << 7); });
}
LAYERSKIP_FN F32x16 ToFloats(I32x16 a) {
  return Lanes([&](int i) { return static_cast<float>(a.v[i]); });
}
LAYERSKIP_FN F32x16 LoadUnsigned(const uint8_t* p) {
  return Lanes([=](int i) { return static_cast<float>(p[i]); });
}

#endif

LAYERSKIP_FN int32_t FourCodes(const int8_t* p) {
  int32_t x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}

// Sums of u * x over eight times four inputs, u unsigned of kBits bits and x signed of seven. AVX2 multiplies to int16,
// which hold a number of such sums (15 * 127 * 2 * 8 < 2^15; for 8 bits the x are within 64) before they are widened.
template <int kBits>
class Sums {
 public:
  LAYERSKIP_FN Sums() : total_(ZeroSums()) {}
#if defined(LAYERSKIP_VNNI) && defined(LAYERSKIP_AVX512)
  template <int kStep>
  LAYERSKIP_FN void Add(Codes u, int32_t x) {
    total_.v = _mm512_dpbusd_epi32(total_.v, u.v, _mm512_set1_epi32(x));
  }
#elif defined(LAYERSKIP_VNNI)
  template <int kStep>
  LAYERSKIP_FN void Add(Codes u, int32_t x) {
    const __m256i x_lanes = _mm256_set1_epi32(x);
    total_.low = _mm256_dpbusd_avx_epi32(total_.low, u.low, x_lanes);
    total_.high = _mm256_dpbusd_avx_epi32(total_.high, u.high, x_lanes);
  }
#elif defined(LAYERSKIP_AVX512)
  template <int kStep>
  LAYERSKIP_FN void Add(Codes u, int32_t x) {
    const __m512i pairs = _mm512_maddubs_epi16(u.v, _mm512_set1_epi32(x));
    part_.v = kStep % kHeld == 0 ? pairs : _mm512_add_epi16(part_.v, pairs);
    if constexpr ((kStep + 1) % kHeld == 0)
      total_.v = _mm512_add_epi32(total_.v, _mm512_madd_epi16(part_.v, _mm512_set1_epi16(1)));
  }
#elif defined(LAYERSKIP_AVX2)
  template <int kStep>
  LAYERSKIP_FN void Add(Codes u, int32_t x) {
    const __m256i x_lanes = _mm256_set1_epi32(x), ones = _mm256_set1_epi16(1);
    const __m256i low = _mm256_maddubs_epi16(u.low, x_lanes), high = _mm256_maddubs_epi16(u.high, x_lanes);
    part_.low = kStep % kHeld == 0 ? low : _mm256_add_epi16(part_.low, low);
    part_.high = kStep % kHeld == 0 ? high : _mm256_add_epi16(part_.high, high);
    if constexpr ((kStep + 1) % kHeld == 0) {
      total_.low = _mm256_add_epi32(total_.low, _mm256_madd_epi16(part_.low, ones));
      total_.high = _mm256_add_epi32(total_.high, _mm256_madd_epi16(part_.high, ones));
    }
  }
#else
  template <int kStep>
  LAYERSKIP_FN void Add(Codes u, int32_t x) {
    int8_t x4[4];
    __builtin_memcpy(x4, &x, sizeof(x4));
    for (int lane = 0; lane < kLanes; ++lane)
      for (int j = 0; j < 4; ++j) total_.v[lane] += u.v[4 * lane + j] * x4[j];
  }
#endif
  LAYERSKIP_FN I32x16 Total() const { return total_; }

 private:
  static constexpr int kHeld = kBits == 4 ? 8 : kBits == 5 ? 4 : kBits == 6 ? 2 : 1;
  I32x16 total_;
#if !defined(LAYERSKIP_VNNI) && !defined(LAYERSKIP_PORTABLE)
  Codes part_;
#endif
};

// Sums of u * X over the same inputs, u of 8 bits and X = 128 * high + low.
class PlaneSums {
 public:
#if defined(LAYERSKIP_VNNI) || defined(LAYERSKIP_PORTABLE)
  LAYERSKIP_FN PlaneSums() : high_(), low_() {}
  template <int kStep>
  LAYERSKIP_FN void Add(Codes u, int32_t high, int32_t low) {
    high_.Add<kStep>(u, high);
    low_.Add<kStep>(u, low);
  }
  LAYERSKIP_FN I32x16 Total() const { return AddInts(Times128(high_.Total()), low_.Total()); }

 private:
  Sums<8> high_, low_;
#else
  LAYERSKIP_FN PlaneSums() : total_(ZeroSums()) {}
  // What widens int16 multiplies as well: by 128 for the high plane.
  template <int kStep>
  LAYERSKIP_FN void Add(Codes u, int32_t high, int32_t low) {
    AddWidened(u, high, 128);
    AddWidened(u, low, 1);
  }
  LAYERSKIP_FN I32x16 Total() const { return total_; }

 private:
  LAYERSKIP_FN void AddWidened(Codes u, int32_t x, int16_t by) {
#if defined(LAYERSKIP_AVX512)
    const __m512i pairs = _mm512_maddubs_epi16(u.v, _mm512_set1_epi32(x));
    total_.v = _mm512_add_epi32(total_.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(by)));
#else
    const __m256i x_lanes = _mm256_set1_epi32(x), factor = _mm256_set1_epi16(by);
    const __m256i low = _mm256_maddubs_epi16(u.low, x_lanes), high = _mm256_maddubs_epi16(u.high, x_lanes);
    total_.low = _mm256_add_epi32(total_.low, _mm256_madd_epi16(low, factor));
    total_.high = _mm256_add_epi32(total_.high, _mm256_madd_epi16(high, factor));
#endif
  }

  I32x16 total_;
#endif
};

// ---- the types ----

// One block of 32 inputs and 16 columns: where its scales and codes stand.
struct BlockView {
  const uint8_t *super, *scales, *codes;  // super: scales of 256 inputs, where there are such
};

// kBits of codes u, which stand for u - kZero; kHasC: there is a c, of sign kSign in a * S + kSign * c * T.
template <WeightType kType>
struct BlockTraits;

template <int kBitsOf, int kZeroOf, bool kHasCOf>
struct SmallBlock {
  static constexpr int kBits = kBitsOf, kZero = kZeroOf, kSign = 1, kHalves = 1;
  static constexpr bool kHasC = kHasCOf;
  static constexpr int64_t kScaleBytes = (kHasC ? 2 : 1) * 2 * kGroup, kBytes = kScaleBytes + kBits * 4 * kGroup;

  LAYERSKIP_FN static BlockView At(const uint8_t* group, int64_t block) {
    const uint8_t* at = group + block * kBytes;
    return {nullptr, at, at + kScaleBytes};
  }
  LAYERSKIP_FN static F32x16 A(const BlockView& block, int) {
    return Load(reinterpret_cast<const Float16*>(block.scales));
  }
  LAYERSKIP_FN static F32x16 C(const BlockView& block) {
    return Load(reinterpret_cast<const Float16*>(block.scales) + kGroup);
  }
};

template <>
struct BlockTraits<WeightType::kQ4_0> : SmallBlock<4, 8, false> {};
template <>
struct BlockTraits<WeightType::kQ4_1> : SmallBlock<4, 0, true> {};
template <>
struct BlockTraits<WeightType::kQ5_0> : SmallBlock<5, 16, false> {};
template <>
struct BlockTraits<WeightType::kQ5_1> : SmallBlock<5, 0, true> {};
template <>
struct BlockTraits<WeightType::kQ8_0> : SmallBlock<8, 128, false> {};

template <int kBitsOf, int kZeroOf, bool kHasCOf, int kHalvesOf>
struct SuperBlock {
  static constexpr int kBits = kBitsOf, kZero = kZeroOf, kSign = -1, kHalves = kHalvesOf;
  static constexpr bool kHasC = kHasCOf;
  static constexpr int64_t kSubs = 8, kSuperBytes = (kHasC ? 2 : 1) * 2 * kGroup;
  static constexpr int64_t kSubBytes = 2 * kGroup + kBits * 4 * kGroup, kBytes = kSuperBytes + kSubs * kSubBytes;

  LAYERSKIP_FN static BlockView At(const uint8_t* group, int64_t block) {
    const uint8_t* super = group + block / kSubs * kBytes;
    const uint8_t* at = super + kSuperBytes + block % kSubs * kSubBytes;
    return {super, at, at + 2 * kGroup};
  }
  LAYERSKIP_FN static F32x16 A(const BlockView& block, int half) {
    const F32x16 d = Load(reinterpret_cast<const Float16*>(block.super));
    if constexpr (kHalves == 2) return Mul(d, Load(reinterpret_cast<const int8_t*>(block.scales) + half * kGroup));
    return Mul(d, LoadUnsigned(block.scales));
  }
  LAYERSKIP_FN static F32x16 C(const BlockView& block) {
    return Mul(Load(reinterpret_cast<const Float16*>(block.super) + kGroup), LoadUnsigned(block.scales + kGroup));
  }
};

template <>
struct BlockTraits<WeightType::kQ4K> : SuperBlock<4, 0, true, 1> {};
template <>
struct BlockTraits<WeightType::kQ5K> : SuperBlock<5, 0, true, 1> {};
template <>
struct BlockTraits<WeightType::kQ6K> : SuperBlock<6, 32, false, 2> {};

// Codes of inputs 4 * kStep .. 4 * kStep + 3: the layout of block_types.cpp.
template <int kBits, int kStep>
LAYERSKIP_FN Codes CodesAt(const uint8_t* codes) {
  if constexpr (kBits == 8) {
    return LoadCodes(codes + 64 * kStep);
  } else {
    const Codes both = LoadCodes(codes + 64 * (kBits - 4 + kStep % 4));
    const Codes low = kStep < 4 ? And(both, 15) : And(ShiftUp<-4>(both), 15);
    if constexpr (kBits == 4) return low;
    if constexpr (kBits == 5) return Or(low, And(ShiftUp<4 - kStep>(LoadCodes(codes)), 16));
    if constexpr (kBits == 6)
      return Or(low, And(ShiftUp<4 - 2 * (kStep % 4)>(LoadCodes(codes + 64 * (kStep / 4))), 48));
  }
}

template <int kFirst, int kLast, class F>
LAYERSKIP_FN void ForSteps(const F& f) {
  if constexpr (kFirst < kLast) {
    f(std::integral_constant<int, kFirst>{});
    ForSteps<kFirst + 1, kLast>(f);
  }
}

// ---- the dot ----

// Rows whose sums are held in registers while a block of weights goes by; they divide kTileRows.
#if defined(LAYERSKIP_AVX512)
template <int kPlanes>
inline constexpr int kRowsAtOnce = kPlanes == 1 ? 12 : 8;
#elif defined(LAYERSKIP_AVX2)
template <int kPlanes>
inline constexpr int kRowsAtOnce = 4;
#else
template <int kPlanes>
inline constexpr int kRowsAtOnce = 1;
#endif

LAYERSKIP_FN int64_t Least(int64_t a, int64_t b) { return a < b ? a : b; }

LAYERSKIP_FN void FetchBlock(const uint8_t* block, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(block + 4096 + line, 0, 2);
}

// Eight segments' sums, one for each row, as the tree of rule 1 adds them.
template <int kRows>
class Segments {
 public:
  LAYERSKIP_FN void Put(int s, int r, F32x16 sum) { sums_[s][r] = sum; }
  LAYERSKIP_FN F32x16 Tree(int r) const {
    const auto pair = [&](int s) { return layerskip::Add(sums_[s][r], sums_[s + 1][r]); };
    return layerskip::Add(layerskip::Add(pair(0), pair(2)), layerskip::Add(pair(4), pair(6)));
  }

 private:
  F32x16 sums_[kSegments][kRows];
};

// One plane: rows x[0 .. kRows] of each block, `stride` records apart from block to block.
template <WeightType kType, int kRows>
void DotOnePlane(const IntegerBlock<1>* x, int64_t stride, int64_t blocks, const uint8_t* group, F32x16 (&out)[kRows]) {
  using Traits = BlockTraits<kType>;
  constexpr int kSteps = 8 / Traits::kHalves;
  const int64_t length = (blocks + kSegments - 1) / kSegments;
  Segments<kRows> segments;
  for (int s = 0; s < kSegments; ++s) {
    F32x16 acc[kRows];
    for (int r = 0; r < kRows; ++r) acc[r] = Zero();
    for (int64_t b = Least(s * length, blocks); b < Least((s + 1) * length, blocks); ++b) {
      const BlockView block = Traits::At(group, b);
      const IntegerBlock<1>* x_b = x + b * stride;
      FetchBlock(block.codes, 64 * Traits::kBits);
      ForSteps<0, Traits::kHalves>([&](auto half) {
        constexpr int kHalf = decltype(half)::value;
        Sums<Traits::kBits> sums[kRows];
        ForSteps<0, kSteps>([&](auto step) {
          constexpr int kStep = decltype(step)::value, kAt = kHalf * kSteps + kStep;
          const Codes u = CodesAt<Traits::kBits, kAt>(block.codes);
#pragma GCC unroll 12
          for (int r = 0; r < kRows; ++r) sums[r].template Add<kStep>(u, FourCodes(x_b[r].planes[0] + 4 * kAt));
        });
        const F32x16 a = Traits::A(block, kHalf);
        F32x16 c;
        if constexpr (Traits::kHasC) c = Traits::C(block);
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
          const int32_t total = Traits::kHalves == 2 ? x_b[r].sums[kHalf] : x_b[r].sums[0] + x_b[r].sums[1];
          I32x16 S = sums[r].Total();
          if constexpr (Traits::kZero != 0) S = Sub(S, BroadcastInt(Traits::kZero * total));
          const F32x16 scale = Broadcast(x_b[r].scale);
          F32x16 term = Mul(Mul(a, scale), ToFloats(S));
          if constexpr (Traits::kHasC)
            term = Add(term, Mul(Mul(c, scale), Broadcast(static_cast<float>(Traits::kSign * total))));
          acc[r] = Add(acc[r], term);
        }
      });
    }
    for (int r = 0; r < kRows; ++r) segments.Put(s, r, acc[r]);
  }
  for (int r = 0; r < kRows; ++r) out[r] = segments.Tree(r);
}

template <int kRows>
void DotQ8(const IntegerBlock<2>* x, int64_t stride, int64_t blocks, const uint8_t* group, F32x16 (&out)[kRows]) {
  using Traits = BlockTraits<WeightType::kQ8_0>;
  const int64_t length = (blocks + kSegments - 1) / kSegments;
  Segments<kRows> segments;
  for (int s = 0; s < kSegments; ++s) {
    F32x16 acc[kRows];
    for (int r = 0; r < kRows; ++r) acc[r] = Zero();
    for (int64_t b = Least(s * length, blocks); b < Least((s + 1) * length, blocks); ++b) {
      const BlockView block = Traits::At(group, b);
      const IntegerBlock<2>* x_b = x + b * stride;
      FetchBlock(block.codes, 64 * Traits::kBits);
      PlaneSums sums[kRows];
      ForSteps<0, 8>([&](auto step) {
        constexpr int kStep = decltype(step)::value;
        const Codes u = CodesAt<8, kStep>(block.codes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
          sums[r].template Add<kStep>(u, FourCodes(x_b[r].planes[0] + 4 * kStep),
                                      FourCodes(x_b[r].planes[1] + 4 * kStep));
      });
      const F32x16 a = Traits::A(block, 0);
      for (int r = 0; r < kRows; ++r) {
        const I32x16 S = Sub(sums[r].Total(), BroadcastInt(Traits::kZero * (128 * x_b[r].sums[0] + x_b[r].sums[1])));
        acc[r] = Add(acc[r], Mul(Mul(a, Broadcast(x_b[r].scale)), ToFloats(S)));
      }
    }
    for (int r = 0; r < kRows; ++r) segments.Put(s, r, acc[r]);
  }
  for (int r = 0; r < kRows; ++r) out[r] = segments.Tree(r);
}

// int8 and int15: the planes of weights and of rows are multiplied as polynomials in 128, whose coefficients are sums
// over a whole segment, the highest power first.
template <int kPlanes, int kRows>
void DotSegments(const IntegerBlock<2>* x, int64_t stride, int64_t blocks, const uint8_t* group, F32x16 (&out)[kRows]) {
  constexpr int kPowers = kPlanes + 1;
  constexpr int32_t kZeros[] = {128, 64};  // codes that stand for 0, by plane
  constexpr float kFactors[] = {16384.0f, 128.0f, 1.0f};
  constexpr int64_t kPlaneBytes = kBlock * kGroup;
  const int64_t length = (blocks + kSegments - 1) / kSegments;
  const auto* scales = reinterpret_cast<const float*>(group + blocks * kPlanes * kPlaneBytes);
  Segments<kRows> segments;
  for (int s = 0; s < kSegments; ++s) {
    const int64_t begin = Least(s * length, blocks), end = Least((s + 1) * length, blocks);
    Sums<8> sums[kPowers][kRows];
    int32_t totals[kRows][2] = {};
    for (int64_t b = begin; b < end; ++b) {
      const uint8_t* codes = group + b * kPlanes * kPlaneBytes;
      const IntegerBlock<2>* x_b = x + b * stride;
      FetchBlock(codes, kPlanes * kPlaneBytes);
      ForSteps<0, 8>([&](auto step) {
        constexpr int kStep = decltype(step)::value;
        ForSteps<0, kPlanes>([&](auto plane) {
          constexpr int kPlane = decltype(plane)::value;
          const Codes u = CodesAt<8, kStep>(codes + kPlane * kPlaneBytes);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            sums[kPlane][r].template Add<kStep>(u, FourCodes(x_b[r].planes[0] + 4 * kStep));
            sums[kPlane + 1][r].template Add<kStep>(u, FourCodes(x_b[r].planes[1] + 4 * kStep));
          }
        });
      });
      for (int r = 0; r < kRows; ++r)
        for (int plane = 0; plane < 2; ++plane) totals[r][plane] += x_b[r].sums[plane];
    }
    const F32x16 weight_scale = Load(scales + s * kGroup);
    for (int r = 0; r < kRows; ++r) {
      F32x16 term = Zero();
      if (begin < end) {
        const F32x16 scale = Mul(Broadcast(x[begin * stride + r].scale), weight_scale);
        for (int power = 0; power < kPowers; ++power) {
          int32_t zeros = 0;
          if (power < kPlanes) zeros += kZeros[power] * totals[r][0];
          if (power > 0) zeros += kZeros[power - 1] * totals[r][1];
          const F32x16 S = ToFloats(Sub(sums[power][r].Total(), BroadcastInt(zeros)));
          const F32x16 product = Mul(S, Mul(Broadcast(kFactors[3 - kPowers + power]), scale));
          term = power == 0 ? product : Add(term, product);
        }
        term = Add(Zero(), term);
      }
      segments.Put(s, r, term);
    }
  }
  for (int r = 0; r < kRows; ++r) out[r] = segments.Tree(r);
}

// Calls f(std::integral_constant<int, n>) for a run-time n in 1..kMax.
template <int kMax, class F>
LAYERSKIP_FN void WithRows(int64_t n, const F& f) {
  if constexpr (kMax > 1) {
    if (n < kMax) return WithRows<kMax - 1>(n, f);
  }
  f(std::integral_constant<int, kMax>{});
}

template <WeightType kType>
void DotGroups(const void* integers, int64_t rows, int64_t k, const void* weight, int64_t n, int64_t group_begin,
               int64_t group_end, float* out) {
  constexpr int kPlanes = RoundingOf(kType) == Rounding::kOnePlane ? 1 : 2;
  const int64_t blocks = Blocks(k), group_bytes = GroupBytes(kType, k);
  const IntegerRows<kPlanes> x{static_cast<IntegerBlock<kPlanes>*>(const_cast<void*>(integers)), rows, blocks};
  constexpr int kMost = kRowsAtOnce<kPlanes>;
  // Tile by tile, so that the rows stay in the first-level cache while the weights go by.
  for (int64_t tile = 0; tile < rows; tile += x.TileRows()) {
    for (int64_t group = group_begin; group < group_end; ++group) {
      const uint8_t* w = static_cast<const uint8_t*>(weight) + group * group_bytes;
      const int64_t columns = Least(kGroup, n - group * kGroup), tile_end = Least(tile + x.TileRows(), rows);
      for (int64_t row = tile; row < tile_end; row += kMost) {
        WithRows<kMost>(Least(kMost, tile_end - row), [&](auto count) {
          constexpr int kRows = decltype(count)::value;
          F32x16 y[kRows];
          if constexpr (WeightPlanes(kType) > 0) {
            DotSegments<WeightPlanes(kType), kRows>(x.At(row, 0), x.TileRows(), blocks, w, y);
          } else if constexpr (kType == WeightType::kQ8_0) {
            DotQ8<kRows>(x.At(row, 0), x.TileRows(), blocks, w, y);
          } else {
            DotOnePlane<kType, kRows>(x.At(row, 0), x.TileRows(), blocks, w, y);
          }
          for (int r = 0; r < kRows; ++r) {
            float* to = out + (row + r) * n + group * kGroup;
            if (columns == kGroup) {
              Store(to, y[r]);
            } else {
              StoreFirst(to, y[r], columns);
            }
          }
        });
      }
    }
  }
}

void Dot(const void* integers, int64_t rows, int64_t k, WeightView weight, int64_t n, int64_t group_begin,
         int64_t group_end, float* out) {
  switch (weight.type) {
#define LAYERSKIP_CASE(type) \
  case WeightType::type:     \
    return DotGroups<WeightType::type>(integers, rows, k, weight.data, n, group_begin, group_end, out)
    LAYERSKIP_CASE(kInt8);
    LAYERSKIP_CASE(kInt15);
    LAYERSKIP_CASE(kQ4_0);
    LAYERSKIP_CASE(kQ4_1);
    LAYERSKIP_CASE(kQ5_0);
    LAYERSKIP_CASE(kQ5_1);
    LAYERSKIP_CASE(kQ8_0);
    LAYERSKIP_CASE(kQ4K);
    LAYERSKIP_CASE(kQ5K);
    LAYERSKIP_CASE(kQ6K);
#undef LAYERSKIP_CASE
    default:
      __builtin_unreachable();
  }
}

// ---- activations ----

constexpr float kSmallestMaximum = 0x1p-100f;

LAYERSKIP_FN uint32_t LargestBits(const float* x, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = BitCast<uint32_t>(x[i]) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// To nearest even, for |x| < 2^22.
LAYERSKIP_FN int32_t ToInteger(float x) {
  return static_cast<int32_t>(BitCast<uint32_t>(x + kRoundMagic) - BitCast<uint32_t>(kRoundMagic));
}

struct Scale {
  float scale, inverse;
};

// What the largest magnitude of a piece makes of it; an infinity or a NaN: a scale of NaN, and zeros.
template <int kPlanes>
LAYERSKIP_FN Scale ScaleOf(uint32_t largest_bits) {
  if (largest_bits >= 0x7f800000u) return {BitCast<float>(0x7fc00000u), 0.0f};
  if constexpr (kPlanes == 1) {
    const float maximum =
        BitCast<float>(largest_bits) > kSmallestMaximum ? BitCast<float>(largest_bits) : kSmallestMaximum;
    return {maximum / 127.0f, 127.0f / maximum};
  } else {
    const uint32_t exponent = largest_bits >> 23 > 14 ? largest_bits >> 23 : 14;
    return {BitCast<float>((exponent - 12) << 23), BitCast<float>((266 - exponent) << 23)};
  }
}

template <int kPlanes>
LAYERSKIP_FN void RoundBlock(const float* x, const Scale& scale, IntegerBlock<kPlanes>& out) {
  int32_t X[kBlock];
  const bool finite = scale.scale == scale.scale;
  for (int i = 0; i < kBlock; ++i) X[i] = ToInteger((finite ? x[i] : 0.0f) * scale.inverse);
  int32_t sums[2] = {0, 0};
  if constexpr (kPlanes == 1) {
    for (int i = 0; i < kBlock / 2; ++i) sums[0] += X[i];
    for (int i = kBlock / 2; i < kBlock; ++i) sums[1] += X[i];
    for (int i = 0; i < kBlock; ++i) out.planes[0][i] = static_cast<int8_t>(X[i]);
  } else {
    for (int i = 0; i < kBlock; ++i) {
      const int32_t high = (X[i] + 64) >> 7, low = X[i] - high * 128;
      sums[0] += high;
      sums[1] += low;
      out.planes[0][i] = static_cast<int8_t>(high);
      out.planes[1][i] = static_cast<int8_t>(low);
    }
  }
  out.scale = scale.scale;
  out.sums[0] = sums[0];
  out.sums[1] = sums[1];
}

template <int kPlanes>
void RoundRow(const float* x, int64_t k, int64_t row, bool by_segment, const IntegerRows<kPlanes>& out) {
  const int64_t length = (out.blocks + kSegments - 1) / kSegments;
  Scale scale{};
  for (int64_t b = 0; b < out.blocks; ++b) {
    const int64_t begin = b * kBlock;
    if (!by_segment) {
      scale = ScaleOf<kPlanes>(LargestBits(x + begin, Least(kBlock, k - begin)));
    } else if (b % length == 0) {
      scale = ScaleOf<kPlanes>(LargestBits(x + begin, Least(length * kBlock, k - begin)));
    }
    if (k - begin >= kBlock) {
      RoundBlock<kPlanes>(x + begin, scale, *out.At(row, b));
    } else {
      float rest[kBlock] = {};
      for (int64_t i = begin; i < k; ++i) rest[i - begin] = x[i];
      RoundBlock<kPlanes>(rest, scale, *out.At(row, b));
    }
  }
}

void RoundRows(Rounding rounding, const float* x, int64_t rows, int64_t k, int64_t row_begin, int64_t row_end,
               void* out) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    if (rounding == Rounding::kOnePlane) {
      RoundRow<1>(x + row * k, k, row, false, {static_cast<IntegerBlock<1>*>(out), rows, Blocks(k)});
    } else {
      const bool by_segment = rounding == Rounding::kTwoPlanesBySegment;
      RoundRow<2>(x + row * k, k, row, by_segment, {static_cast<IntegerBlock<2>*>(out), rows, Blocks(k)});
    }
  }
}

constexpr BlockKernels kBlockTable = {.round_rows = RoundRows, .dot = Dot};

}  // namespace
}  // namespace layerskip
