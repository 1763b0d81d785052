#pragma once
// The control tensor: everything a pass needs that changes from step to step, in 8-byte words on the device.
//   header            ok, skipped, draw, applied, run seed, rounding seed, capacity of directions, capacity of rows
//   seeds             [directions] uint64
//   losses            [2 directions] double, as the estimator saw them
//   groups            [rows][3] double: lr, eps, weight decay
//   coefficients      [rows][directions] double
// A row belongs to a parameter group (and later to a block): tensors name their row in the table of a pass.
#include "core/field.h"
#include "core/rules.h"

namespace pyzo {

struct Control {
  enum : int64_t { kOk, kSkipped, kDraw, kApplied, kRunSeed, kRoundingSeed, kDirections, kRows, kHeader };
  static constexpr int64_t kGroupWords = 3;

  int64_t* words;

  PYZO_HD int64_t directions() const { return words[kDirections]; }
  PYZO_HD int64_t rows() const { return words[kRows]; }
  PYZO_HD int64_t* seeds() const { return words + kHeader; }
  PYZO_HD double* losses() const { return reinterpret_cast<double*>(seeds() + directions()); }
  PYZO_HD double* groups() const { return losses() + 2 * directions(); }
  PYZO_HD double* coefficients() const { return groups() + kGroupWords * rows(); }

  PYZO_HD bool ok() const { return words[kOk] != 0; }
  PYZO_HD uint64_t seed(int64_t j) const { return uint64_t(seeds()[j]); }
  PYZO_HD float coefficient(int64_t row, int64_t j) const { return float(coefficients()[row * directions() + j]); }
  PYZO_HD Group group(int64_t row) const {
    const double* g = groups() + kGroupWords * row;
    return {float(g[0]), float(g[1]), float(g[2])};
  }

  static PYZO_HD int64_t size(int64_t directions, int64_t rows) {
    return kHeader + directions * 3 + rows * (kGroupWords + directions);
  }
};

// Draw the seeds of the next step.
PYZO_HD void begin_step(Control c) {
  const uint64_t run = uint64_t(c.words[Control::kRunSeed]), t = uint64_t(++c.words[Control::kDraw]);
  for (int64_t k = 0; k < c.directions(); ++k) c.seeds()[k] = int64_t(direction_seed(run, t, uint64_t(k)));
  c.words[Control::kRoundingSeed] = int64_t(direction_seed(run, t, kRoundingDirection));
  c.words[Control::kOk] = 1;
}

PYZO_HD bool is_finite(double x) { return (bits<uint64_t>(x) & 0x7ff0000000000000u) != 0x7ff0000000000000u; }

// Two-sided estimate (SPSA; MeZO, arXiv 2305.17333, eq. 1): losses are l(w + eps z_k), l(w - eps z_k) in turn, and
// c_k = (l+ - l-) / (2 eps q). A loss or coefficient that is not finite clears ok and counts a skip.
PYZO_HD void estimate_two_sided(Control c, const double* losses, int64_t q) {
  bool ok = true;
  for (int64_t k = 0; k < 2 * q; ++k) {
    c.losses()[k] = losses[k];
    ok = ok && is_finite(losses[k]);
  }
  for (int64_t row = 0; row < c.rows(); ++row)
    for (int64_t k = 0; k < q; ++k) {
      const double value = (losses[2 * k] - losses[2 * k + 1]) / (2.0 * c.groups()[Control::kGroupWords * row + 1] * double(q));
      c.coefficients()[row * c.directions() + k] = value;
      ok = ok && is_finite(double(float(value)));
    }
  c.words[Control::kOk] = ok;
  c.words[ok ? Control::kApplied : Control::kSkipped] += 1;
}

}  // namespace pyzo
