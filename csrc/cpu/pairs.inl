// Rule 1's products of bf16 numbers two at a time, for kernels.inl: vdpbf16ps adds the products of both halves of a
// 32-bit word to a sum, the upper one first, and rounds after each, as two fused multiply-adds would. But it takes
// subnormal numbers for zeros. No sum is subnormal where every product is a multiple of the least normal number; that
// is watched, and where it does not hold a tile is computed again, one product at a time.
//
// A part of kernels.inl, whose namespaces it is in.

// Segments of whole cache lines: then no product is left over that would have to be computed alone.
LAYERSKIP_FN bool PairsFit(int64_t k) { return k % (kSegments * kLineInputs<BFloat16>) == 0; }

// The magnitudes of bf16 numbers as patterns shifted left by one, less one, so that zero becomes the largest.
LAYERSKIP_FN __m512i Magnitudes(__m512i numbers) {
  return _mm512_sub_epi16(_mm512_add_epi16(numbers, numbers), _mm512_set1_epi16(1));
}

// The exponent field of the smallest number that is not zero.
LAYERSKIP_FN int ExponentOf(__m512i magnitudes) {
  const __m256i half = _mm256_min_epu16(_mm512_castsi512_si256(magnitudes), _mm512_extracti64x4_epi64(magnitudes, 1));
  const __m128i quarter = _mm_min_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  return (_mm_extract_epi16(_mm_minpos_epu16(quarter), 0) + 1) >> 8;
}

// sums + both products of each word.
LAYERSKIP_FN F32x16 AddPairs(F32x16 sums, __m512i a, __m512i b) {
  return {_mm512_dpbf16_ps(sums.v, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b))};
}

// The least exponent field that normal numbers may have whose products with numbers of exponent field `other` or more
// are multiples of 2^-126: the last bit of a number with exponent field a is worth 2^(a - 134). 256: none may.
LAYERSKIP_FN int LeastExponent(int other) { return other < 1 ? 256 : static_cast<int>(Max(1, 2 * 134 - 126 - other)); }

// Memory of a thread's own.
class PairBuffer {
 public:
  PairBuffer() = default;
  PairBuffer(const PairBuffer&) = delete;
  ~PairBuffer() { delete[] words_; }

  // Room for `size` words; what was in it is lost.
  uint32_t* Words(int64_t size) {
    if (size > size_) {
      delete[] words_;
      words_ = new uint32_t[size];
      size_ = size;
    }
    return words_;
  }

 private:
  uint32_t* words_ = nullptr;
  int64_t size_ = 0;
};

// The upper halves of 32 fp32 values as 16 words.
LAYERSKIP_FN __m512i PairsOf(__m512i low, __m512i high) {
  alignas(64) static constexpr uint16_t kUpperHalves[32] = {3,  1,  7,  5,  11, 9,  15, 13, 19, 17, 23,
                                                            21, 27, 25, 31, 29, 35, 33, 39, 37, 43, 41,
                                                            47, 45, 51, 49, 55, 53, 59, 57, 63, 61};
  return _mm512_permutex2var_epi16(low, _mm512_load_si512(kUpperHalves), high);
}

// n fp32 values that are bf16 numbers (n even) -> n / 2 words of two; returns the exponent field of the smallest.
int MakePairs(const float* x, int64_t n, uint32_t* words) {
  __m512i least = _mm512_set1_epi16(-1);
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const __m512i pairs = PairsOf(_mm512_loadu_si512(x + i), _mm512_loadu_si512(x + i + kLanes));
    least = _mm512_min_epu16(least, Magnitudes(pairs));
    _mm512_storeu_si512(words + i / 2, pairs);
  }
  if (i < n) {
    const uint32_t values = (1u << (n - i)) - 1, pairs_left = (1u << (n - i) / 2) - 1;
    const __m512i low = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(values), x + i);
    const __m512i high = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(values >> kLanes), x + i + kLanes);
    const __m512i pairs = PairsOf(low, high);
    least = _mm512_min_epu16(least, Magnitudes(pairs));
    _mm512_mask_storeu_epi32(words + i / 2, static_cast<__mmask16>(pairs_left), pairs);
  }
  return ExponentOf(least);
}

template <int kRows, int kGroups, bool kWatch>
struct PairProducts {
  static constexpr bool kWholeLines = true;
  const uint32_t* x;
  int64_t k;
  const BFloat16* weight;
  __m512i least_magnitude;

  // `tiny`: not zero where a weight was smaller.
  LAYERSKIP_FN void FoldLine(int64_t i, F32x16 (&acc)[kRows][kGroups], uint32_t& tiny) const {
    static_assert(kLineInputs<BFloat16> == 2, "a line is a pair of inputs for 16 columns");
    const uint32_t* x_i = x + (i >> 1);
    const int64_t stride = k >> 1;
    __m512i w[kGroups];
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) w[g] = _mm512_loadu_si512(weight + g * GroupSize(k) + i * kGroup);
    if constexpr (kWatch) {
      __m512i least = Magnitudes(w[0]);
      for (int g = 1; g < kGroups; ++g) least = _mm512_min_epu16(least, Magnitudes(w[g]));
      tiny |= _mm512_cmplt_epu16_mask(least, least_magnitude);
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const __m512i x_r = _mm512_set1_epi32(static_cast<int>(x_i[r * stride]));
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) acc[r][g] = AddPairs(acc[r][g], x_r, w[g]);
    }
  }
};

// The rows of a block for kernels.inl's LinearTask.
template <>
class Operands<BFloat16> {
 public:
  Operands(const float* x, int64_t rows, int64_t k) : x_(x), k_(k) {
    // Few rows wait for bf16 weights however they are multiplied, and their x need not be paired first (docs/log.md).
    if (!PairsFit(k) || rows <= kFewRows) return;
    static thread_local PairBuffer buffer;
    uint32_t* pairs = buffer.Words(rows * k / 2);
    least_exponent_ = LeastExponent(MakePairs(x, rows * k, pairs));
    pairs_ = pairs;
  }

  void NextTile() { weights_ = kUnknown; }

  template <int kRows, int kGroups>
  void Dot(int64_t row, const BFloat16* weight, Pass pass, F32x16 (&y)[kRows][kGroups]) {
    if (pairs_ != nullptr && weights_ != kTiny) DotPairs(row, weight, pass, y);
    if (pairs_ == nullptr || weights_ == kTiny) DotSingly(row, weight, pass, y);
  }

 private:
  enum Weights { kUnknown, kFine, kTiny };
  static constexpr int kFewRows = 4;

  // A tile's weights are watched in the first of its passes, and in one of fewer rows.
  template <int kRows, int kGroups>
  LAYERSKIP_FN void DotPairs(int64_t row, const BFloat16* weight, Pass pass, F32x16 (&y)[kRows][kGroups]) {
    const uint32_t* x = pairs_ + row * k_ / 2;
    const auto least = _mm512_set1_epi16(static_cast<int16_t>(Min(least_exponent_ << 8, 0xffff) - 1));
    if (kRows < kRowsPerPass || weights_ == kUnknown) {
      const PairProducts<kRows, kGroups, true> watching{x, k_, weight, least};
      weights_ = DotTile(watching, k_, weight, pass, y) != 0 ? kTiny : kFine;
      return;
    }
    if constexpr (kRows == kRowsPerPass)
      DotTile(PairProducts<kRows, kGroups, false>{x, k_, weight, least}, k_, weight, pass, y);
  }

  // From row `kFirst` of the tile on, a few rows at a time.
  template <int kFirst = 0, int kRows, int kGroups>
  LAYERSKIP_FN void DotSingly(int64_t row, const BFloat16* weight, Pass pass, F32x16 (&y)[kRows][kGroups]) {
    constexpr int kSome = kRows - kFirst < kFewRows ? kRows - kFirst : kFewRows;
    DotFew(row + kFirst, weight, pass, *reinterpret_cast<F32x16(*)[kSome][kGroups]>(&y[kFirst]));
    if constexpr (kFirst + kSome < kRows) DotSingly<kFirst + kSome>(row, weight, pass, y);
  }

  template <int kRows, int kGroups>
  void DotFew(int64_t row, const BFloat16* weight, Pass pass, F32x16 (&y)[kRows][kGroups]) {
    DotTile(SingleProducts<BFloat16, kRows, kGroups>{x_ + row * k_, k_, weight}, k_, weight, pass, y);
  }

  const float* x_;
  int64_t k_;
  const uint32_t* pairs_ = nullptr;
  int least_exponent_ = 256;  // of weights that go with these x
  Weights weights_ = kUnknown;
};
