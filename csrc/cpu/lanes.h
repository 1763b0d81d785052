// Vector lanes of one instruction set: the lane policy of core/ over 4, 8 or 16 floats, and the moves between lanes and
// memory. Included once by each cpu/isa_*.cpp after it has chosen PYZO_LANES (4: any CPU, 8: AVX2 + FMA + F16C, 16:
// AVX-512). No include guard on purpose: everything lies in that file's own namespace.
#include "core/rounding.h"

namespace pyzo::cpu::PYZO_ISA {

constexpr int kLanes = PYZO_LANES;

struct Lanes {
  typedef float F __attribute__((vector_size(4 * kLanes)));
  typedef uint32_t U __attribute__((vector_size(4 * kLanes)));
  typedef int32_t I __attribute__((vector_size(4 * kLanes)));
  static constexpr int kWidth = kLanes;
  using Number = float;
  static constexpr bool kPlainNaN = true;

  static PYZO_HD F splat(float x) { return x - F{}; }
  static PYZO_HD U splat(uint32_t x) { return x - U{}; }
  static PYZO_HD U iota() {
    U u;
    for (int l = 0; l < kLanes; ++l) u[l] = uint32_t(l);
    return u;
  }

  static PYZO_HD U as_u(F x) { return (U)x; }
  static PYZO_HD F as_f(U x) { return (F)x; }
  static PYZO_HD I as_i(U x) { return (I)x; }
  static PYZO_HD U as_u(I x) { return (U)x; }
  static PYZO_HD F float_of(I x) { return __builtin_convertvector(x, F); }
  static PYZO_HD I truncate(F x) { return __builtin_convertvector(x, I); }
  static PYZO_HD I min(I a, I b) { return a < b ? a : b; }
  static PYZO_HD F positive_one(F x) { return (F)((I)(x > F{}) & (I)splat(0x3f800000u)); }
  static PYZO_HD U above(F a, F b) { return (U)(a > b) & splat(1u); }
  static PYZO_HD U below(U a, U b, U yes, U no) { return (I)a < (I)b ? yes : no; }
  static PYZO_HD F sign_at_top(U x) { return (I)x < (I)splat(0u) ? splat(-1.0f) : splat(1.0f); }
  static PYZO_HD F sqrt_any(F x) { return sqrt(x); }
  static PYZO_HD F divide(F a, F b) { return a / b; }
  static PYZO_HD F if_below(U a, U b, F yes, F no) { return (I)a < (I)b ? yes : no; }
  static PYZO_HD F if_at_most(U x, int32_t most, F yes, F no) { return (I)x <= (I)splat(uint32_t(most)) ? yes : no; }
  static PYZO_HD F reciprocal(F x) { return splat(1.0f) / x; }
  static PYZO_HD F if_less(F a, F b, F yes, F no) { return a < b ? yes : no; }
  static PYZO_HD F abs(F x) { return as_f(as_u(x) & splat(0x7fffffffu)); }
  static PYZO_HD F if_changed(F a, F b) { return ((a < b) | (a > b)) ? a : b; }

#if PYZO_LANES == 16
  static PYZO_HD F fma(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
  static PYZO_HD F sqrt(F x) { return (F)_mm512_sqrt_ps((__m512)x); }
  // The instructions return their second operand where either is NaN or both are 0.
  static PYZO_HD F at_most(F x, F high) { return (F)_mm512_min_ps((__m512)high, (__m512)x); }
  static PYZO_HD F at_least(F x, F low) { return (F)_mm512_max_ps((__m512)low, (__m512)x); }
  static PYZO_HD U mul_hi_lo(uint32_t m, U x, U& lo) {
    const __m512i v = (__m512i)x, mm = _mm512_set1_epi32(int(m));
    const __m512i even = _mm512_mul_epu32(v, mm), odd = _mm512_mul_epu32(_mm512_srli_epi64(v, 32), mm);
    lo = (U)_mm512_mask_shuffle_epi32(even, 0xAAAA, odd, (_MM_PERM_ENUM)0xA0);
    return (U)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
  }
#elif PYZO_LANES == 8
  static PYZO_HD F fma(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
  static PYZO_HD F sqrt(F x) { return (F)_mm256_sqrt_ps((__m256)x); }
  static PYZO_HD F at_most(F x, F high) { return (F)_mm256_min_ps((__m256)high, (__m256)x); }
  static PYZO_HD F at_least(F x, F low) { return (F)_mm256_max_ps((__m256)low, (__m256)x); }
  static PYZO_HD U mul_hi_lo(uint32_t m, U x, U& lo) {
    const __m256i v = (__m256i)x, mm = _mm256_set1_epi32(int(m));
    const __m256i even = _mm256_mul_epu32(v, mm), odd = _mm256_mul_epu32(_mm256_srli_epi64(v, 32), mm);
    lo = (U)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
    return (U)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  }
#else
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  static PYZO_HD F fma(F a, F b, F c) {
#else  // long enough to be called, not copied to every place
  static __attribute__((noinline)) F fma(F a, F b, F c) {
#endif
    F r;
    for (int l = 0; l < kLanes; ++l) r[l] = Scalar::fma(a[l], b[l], c[l]);
    return r;
  }
  static PYZO_HD F sqrt(F x) {
    F r;
    for (int l = 0; l < kLanes; ++l) r[l] = Scalar::sqrt(x[l]);
    return r;
  }
  static PYZO_HD F at_most(F x, F high) { return high < x ? high : x; }
  static PYZO_HD F at_least(F x, F low) { return x < low ? low : x; }
  static PYZO_HD U mul_hi_lo(uint32_t m, U x, U& lo) {
    U hi;
    for (int l = 0; l < kLanes; ++l) {
      uint32_t low;
      hi[l] = Scalar::mul_hi_lo(m, x[l], low);
      lo[l] = low;
    }
    return hi;
  }
#endif

  // Offsets of the counters in the lanes such that transpose() leaves consecutive elements in consecutive lanes: lanes
  // form groups of four (128 bits, which is all that the unpack instructions cross), group g lane j works on counter j
  // * groups + g.
  static PYZO_HD U counter_offsets() {
    const U l = iota();
    return (l & splat(3u)) * splat(uint32_t(kLanes / 4)) + (l >> 2);
  }
  // The other way round: the lane that works on a counter.
  static PYZO_HD int lane_of(int offset) { return offset % (kLanes / 4) * 4 + offset / (kLanes / 4); }
  // In: v[k] lane l = item k of lane l's counter. Out: the 4 * kLanes items in counter order.
  static PYZO_HD void transpose(F v[4]) {
#if PYZO_LANES == 16
    const __m512 a = _mm512_unpacklo_ps((__m512)v[0], (__m512)v[1]), b = _mm512_unpackhi_ps((__m512)v[0], (__m512)v[1]);
    const __m512 c = _mm512_unpacklo_ps((__m512)v[2], (__m512)v[3]), d = _mm512_unpackhi_ps((__m512)v[2], (__m512)v[3]);
    v[0] = (F)_mm512_unpacklo_pd((__m512d)a, (__m512d)c), v[1] = (F)_mm512_unpackhi_pd((__m512d)a, (__m512d)c);
    v[2] = (F)_mm512_unpacklo_pd((__m512d)b, (__m512d)d), v[3] = (F)_mm512_unpackhi_pd((__m512d)b, (__m512d)d);
#elif PYZO_LANES == 8
    const __m256 a = _mm256_unpacklo_ps((__m256)v[0], (__m256)v[1]), b = _mm256_unpackhi_ps((__m256)v[0], (__m256)v[1]);
    const __m256 c = _mm256_unpacklo_ps((__m256)v[2], (__m256)v[3]), d = _mm256_unpackhi_ps((__m256)v[2], (__m256)v[3]);
    v[0] = (F)_mm256_unpacklo_pd((__m256d)a, (__m256d)c), v[1] = (F)_mm256_unpackhi_pd((__m256d)a, (__m256d)c);
    v[2] = (F)_mm256_unpacklo_pd((__m256d)b, (__m256d)d), v[3] = (F)_mm256_unpackhi_pd((__m256d)b, (__m256d)d);
#else
    F t[4];
    for (int j = 0; j < 4; ++j)
      for (int k = 0; k < 4; ++k) t[j][k] = v[k][j];
    for (int j = 0; j < 4; ++j) v[j] = t[j];
#endif
  }

  // Bit l: x <= most in lane l, for x below 2^31.
  static PYZO_HD uint32_t bits_at_most(U x, int32_t most) {
#if PYZO_LANES == 16
    return _mm512_cmple_epi32_mask((__m512i)x, _mm512_set1_epi32(most));
#elif PYZO_LANES == 8
    return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32((__m256i)x, _mm256_set1_epi32(most))))) ^
           0xffu;
#else
    uint32_t bits = 0;
    for (int l = 0; l < kLanes; ++l) bits |= uint32_t(int32_t(x[l]) <= most) << l;
    return bits;
#endif
  }

  // kLanes consecutive 16-bit numbers, zero-extended.
  static PYZO_HD U load_u16(const uint16_t* p) {
#if PYZO_LANES == 16
    return (U)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif PYZO_LANES == 8
    return (U)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
    U u;
    for (int l = 0; l < kLanes; ++l) u[l] = p[l];
    return u;
#endif
  }
  static PYZO_HD void store_u16(uint16_t* p, U u) {
#if PYZO_LANES == 16
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)u));
#elif PYZO_LANES == 8
    const __m256i packed = _mm256_packus_epi32((__m256i)u, (__m256i)u);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
    for (int l = 0; l < kLanes; ++l) p[l] = uint16_t(u[l]);
#endif
  }

  template <Dtype T>
  static PYZO_HD F load(const void* base, int64_t i) {
    if constexpr (T == kFloat32) {
      F x;
      __builtin_memcpy(&x, static_cast<const float*>(base) + i, sizeof x);
      return x;
    } else if constexpr (T == kBFloat16) {
      return as_f(load_u16(static_cast<const uint16_t*>(base) + i) << 16);
    } else {
      const U codes = load_u16(static_cast<const uint16_t*>(base) + i);
#if PYZO_LANES > 4
      if (__builtin_expect(!any_equal(codes & splat(0x7c00u), 0x7c00u), 1)) return half_to_float(codes);
#endif
      return widened(codes);  // the conversion instruction would quiet a signalling NaN
    }
  }
  // x is representable in T.
  template <Dtype T>
  static PYZO_HD void store(void* base, int64_t i, F x) {
    if constexpr (T == kFloat32) {
      __builtin_memcpy(static_cast<float*>(base) + i, &x, sizeof x);
    } else if constexpr (T == kBFloat16) {
      store_u16(static_cast<uint16_t*>(base) + i, as_u(x) >> 16);
    } else {
      uint16_t* p = static_cast<uint16_t*>(base) + i;
#if PYZO_LANES > 4
      if (__builtin_expect(!any_equal(as_u(x) & splat(0x7f800000u), 0x7f800000u), 1)) return store_half(p, x);
#endif
      store_u16(p, narrowed(x));
    }
  }
  // Two neighbouring vectors; packing both at once is cheaper where lanes are narrowed in halves.
  template <Dtype T>
  static PYZO_HD void store2(void* base, int64_t i, F a, F b) {
#if PYZO_LANES == 8
    if constexpr (T == kBFloat16) {
      const __m256i packed = _mm256_packus_epi32((__m256i)(as_u(a) >> 16), (__m256i)(as_u(b) >> 16));
      _mm256_storeu_si256((__m256i*)(static_cast<uint16_t*>(base) + i), _mm256_permute4x64_epi64(packed, 0xD8));
      return;
    }
#endif
    store<T>(base, i, a);
    store<T>(base, i + kLanes, b);
  }

  // Numbers as layers read and write them, who compute with what they read: a NaN stays one but need not keep its bits.
  template <Dtype T>
  static PYZO_HD F read(const void* base, int64_t i) {
#if PYZO_LANES > 4
    if constexpr (T == kFloat16) return half_to_float(static_cast<const uint16_t*>(base) + i);
#endif
    return load<T>(base, i);
  }
  // Rounded to nearest.
  template <Dtype T>
  static PYZO_HD void write(void* base, int64_t i, F x) {
#if PYZO_LANES > 4
    if constexpr (T == kFloat16) return store_half(static_cast<uint16_t*>(base) + i, x);
#endif
    store<T>(base, i, to_storage<Lanes, T>(x));
  }

  // Two vectors of neighbouring numbers, whose order within the two does not matter to what is done element by element:
  // where kAlternate, the first vector holds those at even places, which saves 16-bit numbers every move across lanes.
  template <Dtype T>
  static constexpr bool kAlternate = T == kBFloat16;

  template <Dtype T>
  static PYZO_HD void load_pair(const void* base, int64_t i, F& a, F& b) {
    if constexpr (kAlternate<T>) {
      U both;
      __builtin_memcpy(&both, static_cast<const uint16_t*>(base) + i, sizeof both);
      a = as_f(both << 16), b = as_f(both & splat(0xffff0000u));
    } else {
      a = read<T>(base, i), b = read<T>(base, i + kLanes);
    }
  }
  // Rounded to nearest.
  template <Dtype T>
  static PYZO_HD void store_pair(void* base, int64_t i, F a, F b) {
    if constexpr (kAlternate<T>) {
      const U first = bfloat16_in_upper_half<Lanes>(as_u(a)), second = bfloat16_in_upper_half<Lanes>(as_u(b));
      const U both = (first >> 16) | (second & splat(0xffff0000u));
      __builtin_memcpy(static_cast<uint16_t*>(base) + i, &both, sizeof both);
    } else {
      write<T>(base, i, a), write<T>(base, i + kLanes, b);
    }
  }

  // Rare or slow, and long enough to be called.
  static __attribute__((noinline)) F widened(U codes) { return widen_half<Lanes>(codes); }
  static __attribute__((noinline)) U narrowed(F x) { return narrow_half<Lanes>(x); }

#if PYZO_LANES > 4
  template <Dtype T>
    requires(T == kFloat16)
  static PYZO_HD F round_nearest(F x) {
#if PYZO_LANES == 16
    return (F)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#else
    return (F)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#endif
  }

 private:
  // The conversion instructions of half, for numbers: they change the bits of some NaNs.
#if PYZO_LANES == 16
  static PYZO_HD bool any_equal(U a, uint32_t b) {
    return _mm512_cmpeq_epi32_mask((__m512i)a, _mm512_set1_epi32(int(b))) != 0;
  }
  static PYZO_HD F half_to_float(U codes) { return (F)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)codes)); }
  static PYZO_HD F half_to_float(const uint16_t* p) {
    return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
  }
  static PYZO_HD void store_half(uint16_t* p, F x) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
  }
#else
  static PYZO_HD bool any_equal(U a, uint32_t b) {
    const __m256i equal = _mm256_cmpeq_epi32((__m256i)a, _mm256_set1_epi32(int(b)));
    return !_mm256_testz_si256(equal, equal);
  }
  static PYZO_HD F half_to_float(U codes) {
    const __m256i packed = _mm256_packus_epi32((__m256i)codes, (__m256i)codes);
    return (F)_mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
  }
  static PYZO_HD F half_to_float(const uint16_t* p) { return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  static PYZO_HD void store_half(uint16_t* p, F x) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
  }
#endif
#endif
};

}  // namespace pyzo::cpu::PYZO_ISA
