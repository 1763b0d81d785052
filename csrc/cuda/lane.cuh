#pragma once
// The CUDA lane: the scalar lane of core/ with the conversion instructions of the hardware, and moves of 8 elements.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/pick.h"
#include "core/rounding.h"

namespace pyzo::cuda {

struct Lane : Scalar {
  static constexpr bool kPlainNaN = false;  // it is 0x7fffffff on the device

  template <Dtype T>
  static __device__ __forceinline__ float round_nearest(float x) {
    if constexpr (T == kFloat32)
      return x;
    else if constexpr (T == kBFloat16)
      return __bfloat162float(__float2bfloat16_rn(x));
    else
      return __half2float(__float2half_rn(x));
  }
};

constexpr int kPerThread = 8;

// Elements of a thread form two groups of four; where they lie in a block's tile depends on the size of an element, so
// that every access is 16 bytes wide and neighbouring threads touch neighbouring 16 bytes.
template <Dtype T>
struct Layout {
  static constexpr int kTile = 256 * kPerThread;
  static __device__ __forceinline__ int group(int thread, int g) {
    return T == kFloat32 ? g * (kTile / 2) + thread * 4 : thread * 8 + g * 4;
  }
};

template <Dtype T>
using Storage = std::conditional_t<T == kFloat32, float, uint16_t>;

template <Dtype T>
__device__ __forceinline__ float widen(Storage<T> x) {
  if constexpr (T == kFloat32)
    return x;
  else if constexpr (T == kBFloat16)
    return bits<float>(uint32_t(x) << 16);
  else if ((x & 0x7c00u) != 0x7c00u)
    return __half2float(__ushort_as_half(x));
  else
    return widen_half<Scalar>(x);  // the conversion instruction would change a NaN's bits
}

// x is representable in T.
template <Dtype T>
__device__ __forceinline__ Storage<T> narrow(float x) {
  if constexpr (T == kFloat32)
    return x;
  else if constexpr (T == kBFloat16)
    return uint16_t(bits<uint32_t>(x) >> 16);
  else if (magnitude<Scalar>(x) < 0x7f800000u)
    return __half_as_ushort(__float2half_rn(x));
  else
    return uint16_t(narrow_half<Scalar>(x));
}

// The 8 elements of a thread whose groups both lie inside the tensor, aligned to 16 bytes. at[g]: local index of group
// g.
template <Dtype T>
__device__ __forceinline__ void load8(const void* base, const int64_t at[2], float w[8]) {
  if constexpr (T == kFloat32) {
    const float4 a = *reinterpret_cast<const float4*>(static_cast<const float*>(base) + at[0]);
    const float4 b = *reinterpret_cast<const float4*>(static_cast<const float*>(base) + at[1]);
    w[0] = a.x, w[1] = a.y, w[2] = a.z, w[3] = a.w, w[4] = b.x, w[5] = b.y, w[6] = b.z, w[7] = b.w;
  } else {
    const uint4 v = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(base) + at[0]);
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      w[2 * k] = widen<T>(uint16_t(words[k]));
      w[2 * k + 1] = T == kBFloat16 ? bits<float>(words[k] & 0xffff0000u) : widen<T>(uint16_t(words[k] >> 16));
    }
  }
}

// One 16-byte store. Written out because the compiler splits the assignment of a uint4 here into four.
__device__ __forceinline__ void store16(void* p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

template <Dtype T>
__device__ __forceinline__ void store8(void* base, const int64_t at[2], const float w[8]) {
  if constexpr (T == kFloat32) {
    uint32_t words[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) words[k] = bits<uint32_t>(w[k]);
    store16(static_cast<float*>(base) + at[0], words[0], words[1], words[2], words[3]);
    store16(static_cast<float*>(base) + at[1], words[4], words[5], words[6], words[7]);
  } else {
    uint32_t words[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if constexpr (T == kBFloat16)
        words[k] = __byte_perm(bits<uint32_t>(w[2 * k]), bits<uint32_t>(w[2 * k + 1]), 0x7632);
      else
        words[k] = uint32_t(narrow<T>(w[2 * k])) | uint32_t(narrow<T>(w[2 * k + 1])) << 16;
    }
    store16(static_cast<uint16_t*>(base) + at[0], words[0], words[1], words[2], words[3]);
  }
}

// Noise of four consecutive elements from global index g, a multiple of 4.
template <int kDistribution>
__device__ __forceinline__ void noise4(Source s, uint64_t g, float z[4]) {
  if constexpr (kDistribution == kNormal) {
    normal4<Lane>(field_words<Lane>(s, kNormalStream, g / kNormalPerCounter, 0u), z);
  } else {
    const Words<uint32_t> w = field_words<Lane>(s, kRademacherStream, g / kRademacherPerCounter, 0u);
    const uint32_t at = uint32_t(g) % kRademacherPerCounter;
    const uint32_t word = at < 64 ? (at < 32 ? w.x : w.y) : (at < 96 ? w.z : w.w);
    const uint32_t top = word << (28 - at % 32);  // element k of the four stands in bit 28 + k
#pragma unroll
    for (int k = 0; k < 4; ++k) z[k] = sign_at_top<Lane>(top << (3 - k));
  }
}

__device__ __forceinline__ Index<Lane> index_of(uint64_t g) { return {uint32_t(g), uint32_t(g >> 32)}; }

// Noise of any one element.
template <int kDistribution>
__device__ __forceinline__ float noise1(Source s, uint64_t g) {
  return pick_noise<Lane>(kDistribution, s, index_of(g));
}

// The same of a distribution that is known as the kernel runs, for kernels that are not worth two.
__device__ __forceinline__ void noise4(int distribution, Source s, uint64_t g, float z[4]) {
  if (distribution == kNormal)
    noise4<kNormal>(s, g, z);
  else
    noise4<kRademacher>(s, g, z);
}
__device__ __forceinline__ float noise1(int distribution, Source s, uint64_t g) {
  return pick_noise<Lane>(distribution, s, index_of(g));
}

// Four elements of a state from local index i, a multiple of 4.
template <Dtype S>
__device__ __forceinline__ void load4(const void* base, int64_t i, float x[4]) {
  if constexpr (S == kFloat32) {
    const float4 v = *reinterpret_cast<const float4*>(static_cast<const float*>(base) + i);
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  } else {
    const uint2 v = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(base) + i);
    x[0] = widen<S>(uint16_t(v.x)), x[1] = widen<S>(uint16_t(v.x >> 16));
    x[2] = widen<S>(uint16_t(v.y)), x[3] = widen<S>(uint16_t(v.y >> 16));
  }
}

template <Dtype S>
__device__ __forceinline__ void store4(void* base, int64_t i, const float x[4]) {
  if constexpr (S == kFloat32) {
    store16(static_cast<float*>(base) + i, bits<uint32_t>(x[0]), bits<uint32_t>(x[1]), bits<uint32_t>(x[2]),
            bits<uint32_t>(x[3]));
  } else {
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(base) + i) =
        make_uint2(uint32_t(narrow<S>(x[0])) | uint32_t(narrow<S>(x[1])) << 16,
                   uint32_t(narrow<S>(x[2])) | uint32_t(narrow<S>(x[3])) << 16);
  }
}

// 16 bits for each of a thread's 8 elements, two to a word.
struct Bits8 {
  uint32_t words[4];
  __device__ __forceinline__ uint32_t at(int k) const { return (words[k / 2] >> (16 * (k & 1))) & 0xffffu; }
  __device__ __forceinline__ void set(int k, uint32_t bits) {
    words[k / 2] = k & 1 ? (words[k / 2] & 0xffffu) | bits << 16 : (words[k / 2] & 0xffff0000u) | bits;
  }
};

__device__ __forceinline__ Bits8 load_bits8(const uint16_t* p) {
  const uint4 v = *reinterpret_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
__device__ __forceinline__ void store_bits8(uint16_t* p, const Bits8& bits) {
  store16(p, bits.words[0], bits.words[1], bits.words[2], bits.words[3]);
}

// Of the elements that begin at the global indices global[0] and global[1], four each, in blocks of eight.
template <Dtype T>
__device__ __forceinline__ Bits8 bits8(Source s, Stream stream, const uint64_t global[2]) {
  const Words<uint32_t> a = field_words<Lane>(s, stream, global[0] / kBitsPerCounter, 0u);
  if constexpr (T != kFloat32) return {{a.x, a.y, a.z, a.w}};
  const Words<uint32_t> b = field_words<Lane>(s, stream, global[1] / kBitsPerCounter, 0u);
  const bool high_a = global[0] & 4, high_b = global[1] & 4;
  return {{high_a ? a.z : a.x, high_a ? a.w : a.y, high_b ? b.z : b.x, high_b ? b.w : b.y}};
}

// The bits of a packed mask for a thread's 8 elements. at[g]: local index of group g, a multiple of 4.
__device__ __forceinline__ uint32_t packed8(const uint8_t* packed, const int64_t at[2]) {
  return (packed[at[0] / 8] >> (at[0] & 4) & 15u) | (packed[at[1] / 8] >> (at[1] & 4) & 15u) << 4;
}

// The 16 bits of one element.
__device__ __forceinline__ uint32_t bits1(Source s, Stream stream, uint64_t g) {
  return pick_bits<Lane>(s, stream, index_of(g));
}

// Whether the groups of four of a shard are groups of four (eight, with rounding bits) of the whole tensor.
__device__ __forceinline__ bool in_blocks(const Shard& s) {
  return s.base % 8 == 0 && (s.inner <= 0 || (s.inner % 8 == 0 && s.stride % 8 == 0));
}

}  // namespace pyzo::cuda
