// Codes in lanes: joined into bytes, and turned into slopes. Included once by each cpu/layers_*.cpp; lies in that
// file's own namespace.
#include "cpu/layer_tile.h"

namespace pyzo::cpu::PYZO_ISA {

// Codes are read in groups of 8 elements, which are whole bytes, or 16 where that is a vector; and written in groups of
// 16 where vectors can join them.
constexpr int64_t kGroup = kLanes > 8 ? kLanes : 8;
constexpr int64_t kJoined = kLanes >= 8 ? 16 : 8;

#if PYZO_LANES >= 8
PYZO_HD __m256i bit_positions(int bits) {
  return _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(bits));
}

// 16 codes, a byte each, as bits: neighbours are joined three times.
template <int kBits>
PYZO_HD uint64_t join(__m128i codes) {
  const __m128i two = _mm_maddubs_epi16(codes, _mm_set1_epi16(int16_t(1 | 1 << (8 + kBits))));
  const __m128i four = _mm_madd_epi16(two, _mm_set1_epi32(1 | 1 << (16 + 2 * kBits)));
  const __m128i eight = _mm_or_si128(four, _mm_srli_epi64(four, 32 - 4 * kBits));  // and more above their 8 kBits bits
  alignas(16) int8_t bytes[16];
  for (int b = 0; b < 16; ++b) bytes[b] = int8_t(b < kBits ? b : b < 2 * kBits ? 8 + b - kBits : -1);
  return uint64_t(_mm_cvtsi128_si64(_mm_shuffle_epi8(eight, _mm_load_si128((const __m128i*)bytes))));
}

// A row of a table for each lane.
PYZO_HD F look_up(F table, U row) {
#if PYZO_LANES == 16
  return (F)_mm512_permutexvar_ps((__m512i)row, (__m512)table);
#else
  return (F)_mm256_permutevar8x32_ps((__m256)table, (__m256i)row);
#endif
}

// Finds the codes of 16 elements. A code is found bit by bit, the highest first, as thresholds are in order.
template <int kBits>
struct Coder {
  F middle;            // of the highest bit
  F threshold[kBits];  // of each other bit, by the bits above it

  explicit Coder(const Levels& thresholds) : middle(Lanes::splat(thresholds.level[(1 << (kBits - 1)) - 1])) {
    for (int bit = 1; bit < kBits; ++bit) {
      alignas(64) float row[kLanes] = {};
      for (int above = 0; above < 1 << bit; ++above)
        row[above] = thresholds.level[(above << (kBits - bit)) + (1 << (kBits - 1 - bit)) - 1];
      threshold[bit] = Lanes::load<kFloat32>(row, 0);
    }
  }

  PYZO_HD U codes(F x) const {
    U code = Lanes::above(x, middle);
    for (int bit = 1; bit < kBits; ++bit) {
      const F t = look_up(threshold[bit], code);
#if PYZO_LANES == 16
      const __m512i twice = _mm512_add_epi32((__m512i)code, (__m512i)code);
      code = (U)_mm512_mask_add_epi32(twice, _mm512_cmp_ps_mask((__m512)x, (__m512)t, _CMP_GT_OQ), twice,
                                      _mm512_set1_epi32(1));
#else
      code = code + code - (U)(x > t);
#endif
    }
    return code;
  }

  PYZO_HD uint64_t operator()(const F (&x)[16 / kLanes]) const {
#if PYZO_LANES == 16
    if constexpr (kBits == 1) return _mm512_cmp_ps_mask((__m512)x[0], (__m512)middle, _CMP_GT_OQ);
    return join<kBits>(_mm512_cvtepi32_epi8((__m512i)codes(x[0])));
#else
    if constexpr (kBits == 1) {
      const auto above = [&](F v) { return uint32_t(_mm256_movemask_ps((__m256)(v > middle))); };
      return above(x[0]) | above(x[1]) << 8;
    }
    const __m256i words = _mm256_packs_epi32((__m256i)codes(x[0]), (__m256i)codes(x[1]));
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    return join<kBits>(_mm_shuffle_epi32(bytes, 0xd8));
#endif
  }
};
#else
// Finds the codes of 8 elements.
template <int kBits>
struct Coder {
  const Levels& thresholds;
  PYZO_HD uint64_t operator()(const F (&x)[8 / kLanes]) const {
    uint64_t word = 0;
    for (int v = 0; v < 8 / kLanes; ++v) {
      const U code = code_of<Lanes, kBits>(x[v], thresholds);
      uint32_t lane[kLanes];
      __builtin_memcpy(lane, &code, sizeof code);
      for (int l = 0; l < kLanes; ++l) word |= uint64_t(lane[l]) << ((v * kLanes + l) * kBits);
    }
    return word;
  }
};
#endif

// The codes of a group, which are kBytes bytes. Read in the widths that the machine has: a copy of 3 bytes into a word
// would be 3 stores that the word's load has to wait for.
template <int kBytes>
PYZO_HD uint64_t load_codes(const uint8_t* from) {
  if constexpr (kBytes == 1) {
    return *from;
  } else if constexpr (kBytes == 3 || kBytes == 6) {
    return load_codes<kBytes / 3>(from) | load_codes<kBytes / 3 * 2>(from + kBytes / 3) << (8 * kBytes / 3);
  } else {
    std::conditional_t<kBytes == 2, uint16_t, std::conditional_t<kBytes == 4, uint32_t, uint64_t>> word;
    __builtin_memcpy(&word, from, kBytes);
    return word;
  }
}

// The slopes of the elements of a group.
template <int kBits>
struct SlopeTable {
#if PYZO_LANES == 16
  __m512 level;
  explicit SlopeTable(const Levels& slopes) : level(_mm512_loadu_ps(slopes.level)) {}
  PYZO_HD void look_up(uint64_t word, F slope[1]) const {
    const __m256i low = _mm256_set1_epi32(int(word)), high = _mm256_set1_epi32(int(word >> (8 * kBits)));
    const __m256i at = bit_positions(kBits);
    const __m512i codes =
        _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_srlv_epi32(low, at)), _mm256_srlv_epi32(high, at), 1);
    slope[0] = (F)_mm512_permutexvar_ps(_mm512_and_si512(codes, _mm512_set1_epi32((1 << kBits) - 1)), level);
  }
#elif PYZO_LANES == 8
  __m256 low, high;
  explicit SlopeTable(const Levels& slopes)
      : low(_mm256_loadu_ps(slopes.level)), high(_mm256_loadu_ps(slopes.level + 8)) {}
  PYZO_HD void look_up(uint64_t word, F slope[1]) const {
    const __m256i codes = _mm256_srlv_epi32(_mm256_set1_epi32(int(word)), bit_positions(kBits));
    const __m256i in_table = _mm256_and_si256(codes, _mm256_set1_epi32((1 << kBits) - 1));
    __m256 found = _mm256_permutevar8x32_ps(low, in_table);
    if constexpr (kBits == 4)
      found = _mm256_blendv_ps(found, _mm256_permutevar8x32_ps(high, in_table),
                               _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
    slope[0] = (F)found;
  }
#else
  const float* level;
  explicit SlopeTable(const Levels& slopes) : level(slopes.level) {}
  PYZO_HD void look_up(uint64_t word, F slope[8 / kLanes]) const {
    for (int l = 0; l < 8; ++l)
      reinterpret_cast<Lanes::Number*>(slope)[l] = level[(word >> (l * kBits)) & ((1 << kBits) - 1)];
  }
#endif
};

// Bits of the elements of a pair of vectors, the first in the lowest: 1 for those of one half whose bit is set, -1 for
// the others.
template <Dtype T, int kHalf>
PYZO_HD F signs_of_bits(uint32_t bits) {
#if PYZO_LANES == 1
  return bits >> kHalf & 1u ? 1 : -1;
#else
  const U place = Lanes::kAlternate<T> ? Lanes::iota() * Lanes::splat(2u) + Lanes::splat(uint32_t(kHalf))
                                       : Lanes::iota() + Lanes::splat(uint32_t(kHalf * kLanes));
  const U top = Lanes::splat(~bits) << (Lanes::splat(31u) - place);
  return Lanes::as_f((top & Lanes::splat(0x80000000u)) | Lanes::splat(0x3f800000u));
#endif
}

}  // namespace pyzo::cpu::PYZO_ISA
