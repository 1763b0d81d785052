#pragma once
// The control tensor: everything a pass needs that changes from step to step, on the device, as a matrix of 8-byte
// words [3 + rows, 16 + 2 directions], so that its shape tells both capacities.
//   line 0      header: ok, skipped, draw, applied, run seed, rounding seed, choice (double), first direction
//   line 1      seeds: uint64 of each direction
//   line 2      losses: doubles, as the estimator saw them; from word 2 directions + 1 on the three of choose
//   line 3 + r  row r: what some tensors share (a parameter group; decayed or not; trained since when), then the
//               coefficient of each direction
// Tensors name their row in the table of a pass.
#include "core/field.h"
#include "core/rules.h"

namespace pyzo {

struct Control {
  enum : int64_t { kOk, kSkipped, kDraw, kApplied, kRunSeed, kRoundingSeed, kChoice, kFirst };
  enum : int64_t {
    kLr,
    kEps,
    kWeightDecay,
    kBeta1,
    kBeta2,
    kDampening,
    kRuleEps,
    kOption,       // doubles
    kBorn,         // int64: value of `applied` when the row's tensors joined
    kAge,          // int64: number of the update at hand, 1 for the first
    kCorrection1,  // double: 1 - beta1^age
    kCorrection2,  // double: 1 - beta2^age
    kKeep,         // int64: an element is trained where its 16 mask bits are below; 65536: all are
    kRefresh,      // int64: steps that a mask lasts
    kMaskSeed,     // uint64
    kThreshold,    // double: an element is trained where its magnitude is at most this; +inf: all are
    kCoefficients = 16
  };
  static constexpr int64_t kHeader = 16, kLines = 3;  // words before the directions, lines before the rows

  int64_t* words;
  int64_t directions, rows;

  static PYZO_HD int64_t width(int64_t directions) { return kHeader + 2 * directions; }

  PYZO_HD int64_t* line(int64_t i) const { return words + i * width(directions); }
  PYZO_HD int64_t* seeds() const { return line(1); }
  PYZO_HD double* losses() const { return reinterpret_cast<double*>(line(2)); }
  PYZO_HD int64_t* row_words(int64_t r) const { return line(kLines + r); }
  PYZO_HD double* row(int64_t r) const { return reinterpret_cast<double*>(row_words(r)); }

  PYZO_HD bool ok() const { return words[kOk] != 0; }
  PYZO_HD double& choice() const { return reinterpret_cast<double*>(words)[kChoice]; }
  PYZO_HD uint64_t seed(int64_t j) const { return uint64_t(seeds()[j]); }
  PYZO_HD uint64_t rounding_seed() const { return uint64_t(words[kRoundingSeed]); }
  PYZO_HD uint64_t mask_seed(int64_t r) const { return uint64_t(row_words(r)[kMaskSeed]); }
  PYZO_HD uint32_t keep(int64_t r) const { return uint32_t(row_words(r)[kKeep]); }
  PYZO_HD float threshold(int64_t r) const { return float(row(r)[kThreshold]); }
  PYZO_HD float coefficient(int64_t r, int64_t j) const { return float(row(r)[kCoefficients + j]); }
  PYZO_HD Group group(int64_t r) const {
    const double* d = row(r);
    return {d[kLr],      d[kEps],           d[kWeightDecay],    d[kBeta1],       d[kBeta2],      d[kDampening],
            d[kRuleEps], d[kOption] != 0.0, row_words(r)[kAge], d[kCorrection1], d[kCorrection2]};
  }
};

// Draw the seeds of the next step. Direction k of the control tensor is direction kFirst + k of the step, so that steps
// whose directions lie in several control tensors (blocks of a model) give each a seed of its own.
PYZO_HD void begin_step(Control c) {
  const uint64_t run = uint64_t(c.words[Control::kRunSeed]), t = uint64_t(++c.words[Control::kDraw]);
  const uint64_t first = uint64_t(c.words[Control::kFirst]);
  for (int64_t k = 0; k < c.directions; ++k) c.seeds()[k] = int64_t(direction_seed(run, t, first + uint64_t(k)));
  c.words[Control::kRoundingSeed] = int64_t(direction_seed(run, t, kRoundingDirection));
  for (int64_t r = 0; r < c.rows; ++r) {
    int64_t* row = c.row_words(r);
    const uint64_t refresh = row[Control::kRefresh] > 0 ? uint64_t(row[Control::kRefresh]) : 1;
    row[Control::kMaskSeed] = int64_t(direction_seed(run, 1 + (t - 1) / refresh, kMaskDirection));
  }
  c.words[Control::kOk] = 1;
  c.choice() = 0.0;
}

PYZO_HD bool is_finite(double x) { return (bits<uint64_t>(x) & 0x7ff0000000000000u) != 0x7ff0000000000000u; }

// b^n by binary exponentiation: the same bits everywhere, which libm's pow does not promise.
PYZO_HD double power(double b, int64_t n) {
  double r = 1.0;
  for (; n > 0; n >>= 1, b *= b)
    if (n & 1) r *= b;
  return r;
}

enum Estimate : int { kTwoSided = 0, kOneSided = 1, kForward = 2, kEstimates };
enum Scaling : int { kPlain = 0, kStd = 1, kSigns = 2, kScalings };

PYZO_HD int64_t losses_of(int kind, int64_t q) { return kind == kOneSided ? 1 + q : 2 * q; }

// What is measured along direction k. Losses are, in order of evaluation,
//   two-sided   l(w + eps z_k), l(w - eps z_k) in turn            (SPSA; MeZO, arXiv 2305.17333, definition 1)
//   one-sided   l(w), then l(w + eps z_k)
//   forward     l(w), <grad l(w), z_k> in turn                    (forward-mode differentiation)
PYZO_HD double difference(int kind, const double* losses, int64_t k) {
  if (kind == kTwoSided) return losses[2 * k] - losses[2 * k + 1];
  if (kind == kOneSided) return losses[1 + k] - losses[0];
  return losses[2 * k + 1];
}

// Sample standard deviation of the losses l(w + eps z_k) of a one-sided estimate (FZOO, arXiv 2506.09034).
PYZO_HD double deviation(const double* losses, int64_t q) {
  double sum = 0.0, squares = 0.0;
  for (int64_t k = 0; k < q; ++k) sum += losses[1 + k];
  const double mean = sum / double(q);
  for (int64_t k = 0; k < q; ++k) squares += (losses[1 + k] - mean) * (losses[1 + k] - mean);
  return Scalar::sqrt64(squares / double(q - 1));
}

// Coefficients of g = sum_k c_k z_k in every row from `count` losses (those beyond what the kind needs are only
// watched):
//   plain  difference / (2 eps q), / (eps q), / q by kind      std  difference / (q deviation)      signs  +-1 / q
// A loss or coefficient that is not finite clears ok and counts a skip.
PYZO_HD void estimate(Control c, const double* losses, int64_t count, int kind, int64_t q, int scaling) {
  bool ok = true;
  for (int64_t k = 0; k < count; ++k) {
    if (k < Control::width(c.directions)) c.losses()[k] = losses[k];
    ok = ok && is_finite(losses[k]);
  }
  const double sigma = scaling == kStd ? deviation(losses, q) : 1.0;
  for (int64_t r = 0; r < c.rows; ++r) {
    const double eps = c.row(r)[Control::kEps];
    const double unit = scaling == kSigns ? double(q)
                        : scaling == kStd ? double(q) * sigma
                                          : (kind == kTwoSided   ? 2.0 * eps * double(q)
                                             : kind == kOneSided ? eps * double(q)
                                                                 : double(q));
    for (int64_t k = 0; k < q; ++k) {
      double d = difference(kind, losses, k);
      if (scaling == kSigns && is_finite(d)) d = d > 0.0 ? 1.0 : d < 0.0 ? -1.0 : 0.0;
      const double value = d / unit;
      c.row(r)[Control::kCoefficients + k] = value;
      ok = ok && is_finite(double(float(value)));
    }
  }
  c.words[Control::kOk] = ok;
  c.words[ok ? Control::kApplied : Control::kSkipped] += 1;
  if (!ok) return;
  for (int64_t r = 0; r < c.rows; ++r) {
    const int64_t age = c.words[Control::kApplied] - c.row_words(r)[Control::kBorn];
    c.row_words(r)[Control::kAge] = age;
    c.row(r)[Control::kCorrection1] = 1.0 - power(c.row(r)[Control::kBeta1], age);
    c.row(r)[Control::kCorrection2] = 1.0 - power(c.row(r)[Control::kBeta2], age);
  }
}

// Which of w, w - lr g, w + lr g a conservative step ends at, from the losses there in this order: choice 0, 1 or -1.
// Without a finite l(w) it stays; a candidate whose loss is not finite is never chosen.
PYZO_HD void choose(Control c, const double* losses) {
  for (int64_t k = 0; k < 3; ++k) c.losses()[2 * c.directions + 1 + k] = losses[k];
  const double stay = losses[0], down = losses[1], up = losses[2];
  double choice = 0.0;
  if (c.ok() && is_finite(stay)) {
    if (is_finite(down) && down <= stay && (down <= up || !is_finite(up)))
      choice = 1.0;
    else if (is_finite(up) && up < stay)
      choice = -1.0;
  }
  c.choice() = choice;
}

}  // namespace pyzo
