#pragma once
// The control tensor: everything a pass needs that changes from step to step, on the device, as a matrix of 8-byte
// words [3 + rows, 8 + 2 directions], so that its shape tells both capacities.
//   line 0      header: ok, skipped, draw, applied, run seed, rounding seed
//   line 1      seeds: uint64 of each direction
//   line 2      losses: doubles, as the estimator saw them
//   line 3 + r  row r: doubles lr, eps, weight decay, then the coefficient of each direction
// A row belongs to a parameter group (and later to a block); tensors name their row in the table of a pass.
#include "core/field.h"
#include "core/rules.h"

namespace pyzo {

struct Control {
  enum : int64_t { kOk, kSkipped, kDraw, kApplied, kRunSeed, kRoundingSeed, kHeader = 8 };
  enum : int64_t { kLr, kEps, kWeightDecay, kCoefficients };
  static constexpr int64_t kLines = 3;  // before the rows

  int64_t* words;
  int64_t directions, rows;

  static PYZO_HD int64_t width(int64_t directions) { return kHeader + 2 * directions; }

  PYZO_HD int64_t* line(int64_t i) const { return words + i * width(directions); }
  PYZO_HD int64_t* seeds() const { return line(1); }
  PYZO_HD double* losses() const { return reinterpret_cast<double*>(line(2)); }
  PYZO_HD double* row(int64_t r) const { return reinterpret_cast<double*>(line(kLines + r)); }

  PYZO_HD bool ok() const { return words[kOk] != 0; }
  PYZO_HD uint64_t seed(int64_t j) const { return uint64_t(seeds()[j]); }
  PYZO_HD uint64_t rounding_seed() const { return uint64_t(words[kRoundingSeed]); }
  PYZO_HD float coefficient(int64_t r, int64_t j) const { return float(row(r)[kCoefficients + j]); }
  PYZO_HD Group group(int64_t r) const {
    const double* g = row(r);
    return {float(g[kLr]), float(g[kEps]), float(g[kWeightDecay])};
  }
};

// Draw the seeds of the next step.
PYZO_HD void begin_step(Control c) {
  const uint64_t run = uint64_t(c.words[Control::kRunSeed]), t = uint64_t(++c.words[Control::kDraw]);
  for (int64_t k = 0; k < c.directions; ++k) c.seeds()[k] = int64_t(direction_seed(run, t, uint64_t(k)));
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
  for (int64_t row = 0; row < c.rows; ++row)
    for (int64_t k = 0; k < q; ++k) {
      const double value = (losses[2 * k] - losses[2 * k + 1]) / (2.0 * c.row(row)[Control::kEps] * double(q));
      c.row(row)[Control::kCoefficients + k] = value;
      ok = ok && is_finite(double(float(value)));
    }
  c.words[Control::kOk] = ok;
  c.words[ok ? Control::kApplied : Control::kSkipped] += 1;
}

}  // namespace pyzo
