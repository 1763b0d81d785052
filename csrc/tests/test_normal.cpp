// |z - ideal| <= 1e-5 over the whole input range of each factor of a normal: the radius of 2^32 words, sine and cosine
// of 2^22 angles and both signs. `all` as argument: every word (minutes); without it every exponent, both ends densely.
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <thread>

#include "core/normal.h"
#include "expect.h"

namespace {

using namespace pyzo;

// As core/normal.h documents them, in double precision (u has 33 bits, exact).
double ideal_radius(uint32_t a) { return std::sqrt(-2.0 * std::log((double(a) + 0.5) * 0x1p-32)); }
double ideal_half_turns(uint32_t b) { return double((b & 0x7ffffeu) | 1u) * 0x1p-23 - 0.5; }

struct Worst {
  double radius = 0;    // largest error of r
  double combined = 0;  // largest of |r error| + r angle error + rounding of the product
  uint32_t at = 0;
  float low = INFINITY, high = 0;  // range of r
  void join(const Worst& o) {
    if (o.radius > radius) radius = o.radius, at = o.at;
    combined = std::fmax(combined, o.combined), low = std::fmin(low, o.low), high = std::fmax(high, o.high);
  }
};

void look(Worst& worst, uint32_t a, double angle_error) {
  const float r = radius<Scalar>(a);
  const double difference = std::fabs(double(r) - ideal_radius(a));
  const double error = difference == difference ? difference : INFINITY;  // NaN is worst
  if (error > worst.radius) worst.radius = error, worst.at = a;
  worst.combined = std::fmax(worst.combined, error + double(r) * (angle_error + 0x1p-24));
  worst.low = std::fmin(worst.low, r), worst.high = std::fmax(worst.high, r);
}

Worst every_word(double angle_error) {
  const unsigned threads = std::thread::hardware_concurrency() ? std::thread::hardware_concurrency() : 1;
  Worst part[256];
  std::thread running[256];
  const unsigned n = threads < 256 ? threads : 256;
  for (unsigned t = 0; t < n; ++t)
    running[t] = std::thread([&part, t, n, angle_error] {
      Worst mine;
      for (uint64_t a = t; a < uint64_t(1) << 32; a += n) look(mine, uint32_t(a), angle_error);
      part[t] = mine;
    });
  Worst worst;
  for (unsigned t = 0; t < n; ++t) running[t].join(), worst.join(part[t]);
  return worst;
}

Worst some_words(double angle_error) {
  Worst worst;
  const auto both_ends = [&](uint32_t a) { look(worst, a, angle_error), look(worst, ~a, angle_error); };
  for (uint32_t a = 0; a < 1u << 16; ++a) both_ends(a);                        // tails, small radii
  for (uint32_t a = (1u << 31) - (1u << 12); a < 1u << 31; ++a) both_ends(a);  // u = 1/2, where y turns
  for (int e = 16; e < 31; ++e)                                                // every exponent
    for (uint32_t i = 0; i < 1u << 16; ++i) both_ends((1u << e) + uint32_t((uint64_t(i) << e) >> 16));
  for (uint64_t a = 0; a < uint64_t(1) << 32; a += 4099) look(worst, uint32_t(a), angle_error);  // all over
  return worst;
}

double angles() {
  double worst = 0;
  for (uint32_t k = 0; k < 1u << 22; ++k)
    for (uint32_t top : {0u, 0x80000000u}) {
      const uint32_t b = k << 1 | top;
      float c, s;
      direction_of<Scalar>(b, c, s);
      const double t = ideal_half_turns(b), sign = top ? -1.0 : 1.0;
      worst = std::fmax(worst, std::fabs(double(c) - sign * std::cos(M_PI * t)));
      worst = std::fmax(worst, std::fabs(double(s) - std::sin(M_PI * t)));
    }
  test::Random random{7};
  for (int trial = 0; trial < 100000; ++trial) {  // the other bits of b are not looked at
    const uint32_t b = random.word();
    float c, s, c1, s1;
    direction_of<Scalar>(b, c, s);
    direction_of<Scalar>(b & 0x807ffffeu, c1, s1);
    test::expect(test::same(c, c1) && test::same(s, s1), "direction_of(%08x) depends on bits 0 or 23..30", b);
  }
  return worst;
}

}  // namespace

int main(int argc, char** argv) {
  const bool all = argc > 1 && !std::strcmp(argv[1], "all");
  const double angle = angles();
  const Worst worst = all ? every_word(angle) : some_words(angle);
  std::printf(
      "%s: largest error of the radius %.3e (at word %08x), of sine and cosine %.3e, of a normal at most %.3e\n",
      all ? "every word" : "sampled words", worst.radius, worst.at, angle, worst.combined);
  std::printf("radius in [%.9g, %.9g]\n", double(worst.low), double(worst.high));
  test::expect(worst.radius <= 1e-5, "radius: error %.3e above 1e-5", worst.radius);
  test::expect(worst.combined <= 1e-5, "normal: error %.3e above 1e-5", worst.combined);
  test::expect(worst.low > 0x1p-32f && worst.high < 6.77f, "radius: outside (2^-32, 6.77), where sqrt is not proven");
  return test::report("normal");
}
