// Sixteen fp32 lanes, written once per instruction set. Everything above this file is the same source for all.
//
// A translation unit defines one of LAYERSKIP_AVX512, LAYERSKIP_AVX2 or LAYERSKIP_PORTABLE before including it
// (LAYERSKIP_AVX512_BF16 in addition to the first: pairs.inl) and keeps its own copy (anonymous namespace), so that no
// line compiled for one set is linked into another.
#pragma once

#if !defined(LAYERSKIP_PORTABLE)
#include <immintrin.h>
#endif

#include <cstdint>
#include <type_traits>

#include "contract.h"

namespace layerskip {
namespace {

constexpr int kLanes = 16;

#if defined(LAYERSKIP_AVX512)

struct F32x16 {
  __m512 v;
};

LAYERSKIP_FN F32x16 Zero() { return {_mm512_setzero_ps()}; }
LAYERSKIP_FN F32x16 Broadcast(float x) { return {_mm512_set1_ps(x)}; }
LAYERSKIP_FN F32x16 Load(const float* p) { return {_mm512_loadu_ps(p)}; }
LAYERSKIP_FN void Store(float* p, F32x16 a) { _mm512_storeu_ps(p, a.v); }
LAYERSKIP_FN F32x16 Add(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
LAYERSKIP_FN F32x16 Mul(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
LAYERSKIP_FN F32x16 Fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

LAYERSKIP_FN F32x16 Load(const BFloat16* p) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
}

LAYERSKIP_FN F32x16 Load(const Float16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

// The upper and the lower halves of sixteen 32-bit words.
LAYERSKIP_FN F32x16 LoadUpper(const BFloat16* p) {
  const __m512i upper = _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  return {_mm512_castsi512_ps(upper)};
}
LAYERSKIP_FN F32x16 LoadLower(const BFloat16* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))};
}

LAYERSKIP_FN F32x16 Load(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
}

#elif defined(LAYERSKIP_AVX2)

struct F32x16 {
  __m256 low, high;
};

LAYERSKIP_FN F32x16 Zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
LAYERSKIP_FN F32x16 Broadcast(float x) {
  const __m256 v = _mm256_set1_ps(x);
  return {v, v};
}
LAYERSKIP_FN F32x16 Load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
LAYERSKIP_FN void Store(float* p, F32x16 a) {
  _mm256_storeu_ps(p, a.low);
  _mm256_storeu_ps(p + 8, a.high);
}
LAYERSKIP_FN F32x16 Add(F32x16 a, F32x16 b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
LAYERSKIP_FN F32x16 Mul(F32x16 a, F32x16 b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
LAYERSKIP_FN F32x16 Fma(F32x16 a, F32x16 b, F32x16 c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

LAYERSKIP_FN __m256 WidenBFloat16(const BFloat16* p) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

LAYERSKIP_FN F32x16 Load(const BFloat16* p) { return {WidenBFloat16(p), WidenBFloat16(p + 8)}; }

LAYERSKIP_FN F32x16 Load(const Float16* p) {
  const auto* halves = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}

LAYERSKIP_FN __m256 UpperHalves(const BFloat16* p) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
LAYERSKIP_FN __m256 LowerHalves(const BFloat16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 16));
}

// The upper and the lower halves of sixteen 32-bit words.
LAYERSKIP_FN F32x16 LoadUpper(const BFloat16* p) { return {UpperHalves(p), UpperHalves(p + kLanes)}; }
LAYERSKIP_FN F32x16 LoadLower(const BFloat16* p) { return {LowerHalves(p), LowerHalves(p + kLanes)}; }

LAYERSKIP_FN __m256 WidenInt8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

LAYERSKIP_FN F32x16 Load(const int8_t* p) { return {WidenInt8(p), WidenInt8(p + 8)}; }

#elif defined(LAYERSKIP_PORTABLE)

struct F32x16 {
  float v[kLanes];
};

template <class Lane>
LAYERSKIP_FN F32x16 Lanes(Lane lane) {
  F32x16 a;
  for (int i = 0; i < kLanes; ++i) a.v[i] = lane(i);
  return a;
}

LAYERSKIP_FN F32x16 Zero() { return {}; }
LAYERSKIP_FN F32x16 Broadcast(float x) {
  return Lanes([=](int) { return x; });
}
template <class T>
LAYERSKIP_FN F32x16 Load(const T* p) {
  return Lanes([=](int i) { return ToFloat(p[i]); });
}
LAYERSKIP_FN void Store(float* p, F32x16 a) { __builtin_memcpy(p, a.v, sizeof(a.v)); }
LAYERSKIP_FN F32x16 Add(F32x16 a, F32x16 b) {
  return Lanes([&](int i) { return a.v[i] + b.v[i]; });
}
LAYERSKIP_FN F32x16 Mul(F32x16 a, F32x16 b) {
  return Lanes([&](int i) { return a.v[i] * b.v[i]; });
}
// The upper and the lower halves of sixteen 32-bit words.
LAYERSKIP_FN F32x16 LoadUpper(const BFloat16* p) {
  return Lanes([=](int i) { return ToFloat(p[2 * i + 1]); });
}
LAYERSKIP_FN F32x16 LoadLower(const BFloat16* p) {
  return Lanes([=](int i) { return ToFloat(p[2 * i]); });
}
LAYERSKIP_FN F32x16 Load(const int8_t* p) {
  return Lanes([=](int i) { return static_cast<float>(p[i]); });
}

#else
#error "define LAYERSKIP_AVX512, LAYERSKIP_AVX2 or LAYERSKIP_PORTABLE"
#endif

// acc + a * b for operands of dtype T. Products of 16-bit operands are exact in fp32, so there one fused
// operation gives the bits of two; fp32 operands need both roundings.
template <class T>
LAYERSKIP_FN F32x16 MulAdd(F32x16 a, F32x16 b, F32x16 acc) {
#if !defined(LAYERSKIP_PORTABLE)
  if constexpr (!std::is_same_v<T, float>) return Fma(a, b, acc);
#endif
  return Add(acc, Mul(a, b));
}

// The first n lanes of p (the rest zero), without reading past them.
template <class T>
LAYERSKIP_FN F32x16 LoadFirst(const T* p, int64_t n) {
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = ToFloat(p[i]);
  return Load(lanes);
}

LAYERSKIP_FN void StoreFirst(float* p, F32x16 a, int64_t n) {
  float lanes[kLanes];
  Store(lanes, a);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

template <class T>
LAYERSKIP_FN F32x16 RoundLanes(F32x16 a) {
  float lanes[kLanes];
  Store(lanes, a);
  for (int i = 0; i < kLanes; ++i) lanes[i] = Round<T>(lanes[i]);
  return Load(lanes);
}

}  // namespace
}  // namespace layerskip
