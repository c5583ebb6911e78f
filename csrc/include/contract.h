// The arithmetic contract's scalar rules (docs/arithmetic.md), one body for every compiler that builds them.
//
// Torch-free and branch-free: g++ vectorises these lines, nvcc compiles them for the device, and
// layerskip_kernels/ops/reference writes the same steps in PyTorch. Every product and every sum is rounded
// on its own (-ffp-contract=off, --fmad=false).
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LAYERSKIP_FN __host__ __device__ __forceinline__
#else
#define LAYERSKIP_FN inline __attribute__((always_inline))
#endif

namespace layerskip {

inline constexpr int kSegments = 8;     // rule 1: contiguous segments of a dot product
inline constexpr int kNormLanes = 256;  // rule 2: strided lanes of a sum of squares
inline constexpr int kChunk = 256;      // rule 4: positions per attention chunk

// Each translation unit that compiles these bodies for its own instruction set keeps its own copy.
namespace {

template <class To, class From>
LAYERSKIP_FN To BitCast(From from) {
  static_assert(sizeof(To) == sizeof(From), "BitCast needs equal sizes");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// ---- dtypes: storage types and their rounding (to nearest even, no flush to zero) ----

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

LAYERSKIP_FN float ToFloat(float x) { return x; }

LAYERSKIP_FN float ToFloat(BFloat16 x) { return BitCast<float>(static_cast<uint32_t>(x.bits) << 16); }

LAYERSKIP_FN float ToFloat(Float16 x) {
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const float scaled = BitCast<float>(magnitude) * 0x1p112f;  // exact, subnormals included
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return BitCast<float>(BitCast<uint32_t>(scaled) | special | (static_cast<uint32_t>(x.bits & 0x8000u) << 16));
}

template <class T>
LAYERSKIP_FN T FromFloat(float x);

template <>
LAYERSKIP_FN float FromFloat<float>(float x) {
  return x;
}

template <>
LAYERSKIP_FN BFloat16 FromFloat<BFloat16>(float x) {
  const uint32_t bits = BitCast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(x != x ? 0x7fc0u : rounded)};
}

template <>
LAYERSKIP_FN Float16 FromFloat<Float16>(float x) {
  const uint32_t bits = BitCast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Adding 0.5 puts the last bit of a half-precision subnormal (2^-24) at the last bit of the sum.
  const uint32_t subnormal = BitCast<uint32_t>(BitCast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return {static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u))};
}

// to_dtype and back: the value a T would hold, as fp32.
template <class T>
LAYERSKIP_FN float Round(float x) {
  return ToFloat(FromFloat<T>(x));
}

// ---- rule 5: exp, log, silu, gelu, tanh ----

inline constexpr float kLog2E = 0x1.715476p+0f;
inline constexpr float kLn2Hi = 0x1.63p-1f;  // nine bits: n * kLn2Hi is exact
inline constexpr float kLn2Lo = -0x1.bd0106p-13f;
inline constexpr float kRoundMagic = 0x1.8p+23f;  // adding it rounds to an integer, held in the low bits

inline constexpr double kGeluSlope = 0x1.9884533d43651p+0;  // 2 sqrt(2 / pi)
inline constexpr double kGeluCube = 0.044715;

struct ScaledExp {  // exp(x) = (mantissa + error) * 2^exponent
  float mantissa, error;
  int32_t exponent;
};

struct Reduced {  // x = exponent * ln 2 + r + r_error
  float r, r_error;
  int32_t exponent;
};

LAYERSKIP_FN Reduced Reduce(float x) {
  const float shifted = x * kLog2E + kRoundMagic;
  const float n = shifted - kRoundMagic;
  const float a = x - n * kLn2Hi;
  const float b = n * kLn2Lo;
  const float r = a - b;
  return {r, (a - r) - b, static_cast<int32_t>(BitCast<uint32_t>(shifted) - 0x4b400000u)};
}

// (exp(r) - 1 - r) / r^2
LAYERSKIP_FN float ExpPolynomial(float r) {
  float q = 0x1.6db47ep-10f;
  q = q * r + 0x1.123b92p-7f;
  q = q * r + 0x1.55545ep-5f;
  q = q * r + 0x1.55548ep-3f;
  return q * r + 0x1p-1f;
}

LAYERSKIP_FN ScaledExp ExpOf(Reduced x) {
  const float r = x.r, q = ExpPolynomial(r);
  const float sum = 1.0f + r;
  const float sum_error = (1.0f - sum) + r;
  const float rest = sum_error + (q * (r * r) + x.r_error);
  const float mantissa = sum + rest;
  return {mantissa, (sum - mantissa) + rest, x.exponent};
}

LAYERSKIP_FN ScaledExp ExpParts(float x) { return ExpOf(Reduce(x)); }

// exp(x + low); low: what x is short of.
LAYERSKIP_FN ScaledExp ExpParts(float x, float low) {
  const Reduced rounded = Reduce(x);
  const float r = rounded.r + low;
  return ExpOf({r, rounded.r_error + ((rounded.r - r) + low), rounded.exponent});
}

LAYERSKIP_FN float PowerOfTwo(int32_t n) { return BitCast<float>(static_cast<uint32_t>(n + 127) << 23); }

// mantissa * 2^n for n in -252..254: the first product is exact, the second rounds once.
LAYERSKIP_FN float ScaleByPowerOfTwo(float mantissa, int32_t n) {
  const int32_t half = n >> 1;
  return mantissa * PowerOfTwo(half) * PowerOfTwo(n - half);
}

// NaN compares false and so passes through.
LAYERSKIP_FN float Clamp(float x, float low, float high) {
  const float raised = x < low ? low : x;
  return raised > high ? high : raised;
}

LAYERSKIP_FN float Exp(float x) {
  const ScaledExp e = ExpParts(Clamp(x, -105.0f, 89.0f));
  return ScaleByPowerOfTwo(e.mantissa, e.exponent);
}

// x / (1 + e), the quotient corrected once by what rounding the denominator lost. Where e would overflow, the
// denominator is held scaled by 2^-64.
LAYERSKIP_FN float LogisticProduct(float x, ScaledExp e) {
  const int32_t shift = e.exponent > 64 ? 64 : 0;
  const float one = e.exponent > 64 ? 0.0f : 1.0f;
  const float power = ScaleByPowerOfTwo(e.mantissa, e.exponent - shift);
  const float power_error = ScaleByPowerOfTwo(e.error, e.exponent - shift);
  const float denominator = one + power;
  const float power_part = denominator - one;
  const float sum_error = (one - (denominator - power_part)) + (power - power_part);
  const float quotient = x / denominator;
  const float y = quotient - (quotient * (sum_error + power_error)) / denominator;
  return y * PowerOfTwo(-shift);
}

LAYERSKIP_FN float Silu(float x) {
  float y = LogisticProduct(x, ExpParts(Clamp(-x, -105.0f, 128.0f)));
  y = x > 128.0f ? x : y;
  return x < -128.0f ? -0.0f : y;
}

// x / (1 + exp(-z)), z = 2 sqrt(2 / pi) (x + 0.044715 x^3): computed in double, and its rounding to float is kept.
LAYERSKIP_FN float Gelu(float x) {
  const double wide = Clamp(x, -11.0f, 11.0f);
  const double z = (kGeluSlope * wide) * (1.0 + kGeluCube * (wide * wide));
  const float high = static_cast<float>(-z);
  const float low = static_cast<float>(-z - static_cast<double>(high));
  float y = LogisticProduct(x, ExpParts(high, low));
  y = x > 11.0f ? x : y;
  return x < -11.0f ? -0.0f : y;
}

// e / (e + 2) for e = exp(2 |x|) - 1, corrected once by what rounding e and e + 2 lost, with x's sign.
LAYERSKIP_FN float Tanh(float x) {
  const float doubled = BitCast<float>(BitCast<uint32_t>(x) & 0x7fffffffu) * 2.0f;
  const Reduced y = Reduce(doubled > 20.0f ? 20.0f : doubled);
  const float power = PowerOfTwo(y.exponent);
  const float whole = power - 1.0f, part = power * y.r;
  const float sum = whole + part;
  const float rest = ((whole - sum) + part) + power * (ExpPolynomial(y.r) * (y.r * y.r) + y.r_error);
  const float e = sum + rest;
  const float e_error = (sum - e) + rest;
  const float denominator = 2.0f + e;
  const float e_part = denominator - 2.0f;
  const float denominator_error = (2.0f - (denominator - e_part)) + (e - e_part);
  const float quotient = e / denominator;
  const float result = quotient + (e_error - quotient * (denominator_error + e_error)) / denominator;
  return BitCast<float>((BitCast<uint32_t>(result) & 0x7fffffffu) | (BitCast<uint32_t>(x) & 0x80000000u));
}

// cap * tanh(x / cap)
LAYERSKIP_FN float SoftCap(float x, float cap) { return cap * Tanh(x / cap); }

struct LogParts {  // (1 + f) * 2^e, f in [sqrt(1/2) - 1, sqrt(2) - 1)
  float f, e;
};

LAYERSKIP_FN LogParts SplitForLog(uint32_t bits) {
  // Offsetting by sqrt(1/2) puts the mantissa into [sqrt(1/2), sqrt(2)).
  const uint32_t offset = bits - 0x3f3504f3u;
  return {BitCast<float>((offset & 0x007fffffu) + 0x3f3504f3u) - 1.0f,
          static_cast<float>(static_cast<int32_t>(offset) >> 23)};
}

LAYERSKIP_FN float LogOf(LogParts x) {
  const float f = x.f;
  float p = 0x1.1457a2p-4f;
  p = p * f + -0x1.de3c14p-4f;
  p = p * f + 0x1.e6f06cp-4f;
  p = p * f + -0x1.fc2208p-4f;
  p = p * f + 0x1.233768p-3f;
  p = p * f + -0x1.555c4ep-3f;
  p = p * f + 0x1.99a4b6p-3f;
  p = p * f + -0x1.000006p-2f;
  p = p * f + 0x1.555548p-2f;
  const float square = f * f;
  float y = (p * f) * square + x.e * kLn2Lo;
  y = y - 0.5f * square;
  return (f + y) + x.e * kLn2Hi;
}

LAYERSKIP_FN float Log(float x) {
  const bool subnormal = x < 0x1p-126f;
  LogParts parts = SplitForLog(BitCast<uint32_t>(subnormal ? x * 0x1p23f : x));
  parts.e -= subnormal ? 23.0f : 0.0f;
  float y = LogOf(parts);
  y = x == __builtin_inff() ? x : y;
  y = x == 0.0f ? -__builtin_inff() : y;
  return x < 0.0f || x != x ? __builtin_nanf("") : y;
}

}  // namespace
}  // namespace layerskip
