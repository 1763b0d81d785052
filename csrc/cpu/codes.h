// Codes in lanes: joined into bytes, and turned into slopes. Included once by each cpu/layers_*.cpp; lies in that
// file's own namespace.
#include <type_traits>

#include "cpu/layer_tile.h"

namespace pyzo::cpu::PYZO_ISA {

// Codes are handled in groups of 8 elements, which are whole bytes, or 16 where that is a vector.
constexpr int64_t kGroup = kLanes > 8 ? kLanes : 8;

#if PYZO_LANES >= 8
PYZO_HD __m256i bit_positions(int bits) {
  return _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(bits));
}
#endif

#if PYZO_LANES == 16
PYZO_HD uint16_t above_mask(F x, F threshold) { return _mm512_cmp_ps_mask((__m512)x, (__m512)threshold, _CMP_GT_OQ); }
#elif PYZO_LANES == 8
PYZO_HD uint8_t above_mask(F x, F threshold) {
  return uint8_t(_mm256_movemask_ps(_mm256_cmp_ps((__m256)x, (__m256)threshold, _CMP_GT_OQ)));
}
#endif

// The codes of 8 elements, the first in the lowest bits.
PYZO_HD uint32_t join8(const uint32_t* code, int bits) {
#if PYZO_LANES >= 8
  const __m256i v = _mm256_sllv_epi32(_mm256_loadu_si256((const __m256i*)code), bit_positions(bits));
  __m128i w = _mm_or_si128(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  w = _mm_or_si128(w, _mm_shuffle_epi32(w, 0x4e));
  w = _mm_or_si128(w, _mm_shuffle_epi32(w, 0xb1));
  return uint32_t(_mm_cvtsi128_si32(w));
#else
  uint32_t word = 0;
  for (int l = 0; l < 8; ++l) word |= code[l] << (l * bits);
  return word;
#endif
}

// The codes of a group.
PYZO_HD uint64_t join(const uint32_t* code, int bits) {
  uint64_t word = join8(code, bits);
  if constexpr (kGroup == 16) word |= uint64_t(join8(code + 8, bits)) << (8 * bits);
  return word;
}

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

}  // namespace pyzo::cpu::PYZO_ISA
