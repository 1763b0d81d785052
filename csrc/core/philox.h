#pragma once
// Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11): 128 random bits from a 128-bit
// counter and a 64-bit key, no state. Seven rounds pass BigCrush; Random123 publishes known answers for them.
#include "core/lane.h"

namespace pyzo {

template <class U>
struct Words {
  U x, y, z, w;
};

template <class L, int kRounds = 7>
PYZO_HD Words<typename L::U> philox(Words<typename L::U> c, uint64_t key) {
  using U = typename L::U;
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  PYZO_UNROLL
  for (int round = 0; round < kRounds; ++round) {
    U lo0, lo1;
    const U hi0 = L::mul_hi_lo(0xD2511F53u, c.x, lo0);
    const U hi1 = L::mul_hi_lo(0xCD9E8D57u, c.z, lo1);
    c = {hi1 ^ c.y ^ L::splat(k0), lo1, hi0 ^ c.w ^ L::splat(k1), lo0};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// The four words of one counter, for known answers.
template <int kRounds = 7>
PYZO_HD void philox_at(uint32_t out[4], uint64_t seed, uint64_t high, uint64_t low) {
  const Words<uint32_t> w =
      philox<Scalar, kRounds>({uint32_t(low), uint32_t(low >> 32), uint32_t(high), uint32_t(high >> 32)}, seed);
  out[0] = w.x, out[1] = w.y, out[2] = w.z, out[3] = w.w;
}

}  // namespace pyzo
