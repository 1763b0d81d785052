// Packed masks of one instruction set: read beside the mask bits of a tile, and written from magnitudes. Included once
// by each cpu/isa_*.cpp; lies in that file's own namespace like lanes.h.
#include "cpu/noise.h"

namespace pyzo::cpu::PYZO_ISA {

constexpr uint16_t kNeverKept = 0xffff;

// What a packed mask leaves out gets mask bits that no threshold keeps. origin: local index of the tile's element 0.
inline void leave_out(const uint8_t* packed, int64_t origin, int64_t first, int64_t last, RandomBits& mask) {
  typedef uint16_t Eight __attribute__((vector_size(16)));
  constexpr Eight kPlace = {1, 2, 4, 8, 16, 32, 64, 128};
  const auto one = [&](int64_t i) {
    if (!mask_bit(packed, origin + i)) mask.bits[i] = kNeverKept;
  };
  int64_t i = first;
  for (; i < last && (origin + i) % 8 != 0; ++i) one(i);
  for (; i + 8 <= last; i += 8) {
    Eight bits;
    __builtin_memcpy(&bits, mask.bits + i, sizeof bits);
    bits |= (Eight)((kPlace & uint16_t(packed[(origin + i) / 8])) == 0);
    __builtin_memcpy(mask.bits + i, &bits, sizeof bits);
  }
  for (; i < last; ++i) one(i);
}

template <Dtype T>
void mask_bits_tensor(const void* weights, int32_t most, uint8_t* packed, int64_t begin, int64_t end) {
  constexpr int64_t kSize = T == kFloat32 ? 4 : 2, kGroup = kLanes > 8 ? kLanes : 8;
  const auto bits_of = [&](const void* from, int64_t at) {
    uint32_t bits = 0;
    for (int64_t l = 0; l < kGroup; l += kLanes)
      bits |= Lanes::bits_at_most(magnitude<Lanes>(Lanes::load<T>(from, at + l)), most) << l;
    return bits;
  };
  int64_t i = begin;
  for (; i + kGroup <= end; i += kGroup) {
    const uint32_t bits = bits_of(weights, i);
    __builtin_memcpy(packed + i / 8, &bits, kGroup / 8);
  }
  if (i < end) {
    alignas(64) char buffer[kGroup * kSize] = {};
    __builtin_memcpy(buffer, static_cast<const char*>(weights) + i * kSize, (end - i) * kSize);
    const uint32_t bits = bits_of(buffer, 0) & ((1u << (end - i)) - 1u);
    __builtin_memcpy(packed + i / 8, &bits, mask_bytes(end - i));
  }
}

void mask_bits(const void* weights, Dtype dtype, int32_t most, uint8_t* packed, int64_t begin, int64_t end) {
  switch (dtype) {
    case kFloat32:
      return mask_bits_tensor<kFloat32>(weights, most, packed, begin, end);
    case kBFloat16:
      return mask_bits_tensor<kBFloat16>(weights, most, packed, begin, end);
    case kFloat16:
      return mask_bits_tensor<kFloat16>(weights, most, packed, begin, end);
    case kFloat64:
      break;  // no weight has it
  }
}

}  // namespace pyzo::cpu::PYZO_ISA
