#pragma once
// Standard normals from Philox words by Box-Muller, in IEEE + - * fma and sqrt only: the same bits from every compiler
// and device that rounds correctly and does not contract. A word pair (a, b) is mapped to (r cos, r sin) as follows.
//   radius  u = (a + 1/2) / 2^32, r = sqrt(-2 ln u). u is never formed: a is converted as a signed integer, which keeps
//   all
//           32 bits at both ends, near u = 0 (the tails, up to 6.76) and near u = 1 (where r is the root of 1 - u).
//   angle   half turns t = odd / 2^23 - 1/2 from bits 1..22 of b, symmetric about 0; cos(pi t) takes bit 31 of b as its
//   sign.
// Polynomials: minimax, fitted by tools in bench/fit_normal.py. |z - ideal| <= 1e-5 for every (a, b).
#include "core/field.h"

namespace pyzo {

// sqrt(-2 ln u), u = (a + 1/2) / 2^32.
template <class L>
PYZO_HD typename L::F radius(typename L::U a) {
  using F = typename L::F;
  using I = typename L::I;
  // y = u where u < 1/2, u - 1 where u >= 1/2. The factor is one ulp below 2^-32 so that |y| never rounds up to 1/2.
  const F y = L::fma(L::float_of(L::as_i(a)), L::splat(bits<float>(0x2f7fffffu)), L::splat(0x1p-33f));
  // y > 0: y = 2^k m with m in [1/2, 1), k < 0.  y < 0: k = 0, m = y.
  const I exponent = L::as_i(L::as_u(y) - L::splat(0x3f000000u));
  const I k = L::min(exponent, L::as_i(L::splat(0u))) & L::as_i(L::splat(0xff800000u));
  const F m = L::as_f(L::as_u(y) - L::as_u(k));
  const F f = m - L::positive_one(y);  // ln u = k ln 2 + ln(1 + f), f in [-1/2, 0)
  F p = L::splat(1.9638747f);          // -2 ln(1 + f) / f
  p = L::fma(p, f, L::splat(0.99445254f));
  p = L::fma(p, f, L::splat(0.99253517f));
  p = L::fma(p, f, L::splat(-0.58678675f));
  p = L::fma(p, f, L::splat(1.0054013f));
  p = L::fma(p, f, L::splat(-1.9998971f));
  const F s = L::fma(L::float_of(k), L::splat(-1.6525917e-07f), f * p);  // -2 ln 2 / 2^23
  return L::sqrt(s);
}

// cos and sin of the angle of b.
template <class L>
PYZO_HD void direction_of(typename L::U b, typename L::F& c, typename L::F& s) {
  using F = typename L::F;
  const F t = L::as_f((b & L::splat(0x007ffffeu)) | L::splat(0x3f800001u)) - L::splat(1.5f);
  const F z = t * t;
  F q = L::splat(-0.55463620f);
  q = L::fma(q, z, L::splat(2.5418990f));
  q = L::fma(q, z, L::splat(-5.1671428f));
  q = L::fma(q, z, L::splat(3.1415820f));
  s = t * q;
  F p = L::splat(0.21969681f);
  p = L::fma(p, z, L::splat(-1.3318802f));
  p = L::fma(p, z, L::splat(4.0584119f));
  p = L::fma(p, z, L::splat(-4.9347929f));
  p = L::fma(p, z, L::splat(0.99999995f));
  c = L::as_f(L::as_u(p) ^ (b & L::splat(0x80000000u)));
}

// The four normals of a counter: elements 4 block + 0..3.
template <class L>
PYZO_HD void normal4(const Words<typename L::U>& w, typename L::F z[4]) {
  using F = typename L::F;
  F c, s, r = radius<L>(w.x);
  direction_of<L>(w.y, c, s);
  z[0] = r * c;
  z[1] = r * s;
  r = radius<L>(w.z);
  direction_of<L>(w.w, c, s);
  z[2] = r * c;
  z[3] = r * s;
}

}  // namespace pyzo
