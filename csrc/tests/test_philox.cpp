// Philox against the known answers of Random123 (DEShawResearch/random123, tests/kat_vectors), 7 and 10 rounds.
#include "expect.h"

namespace {

struct KnownAnswer {
  int rounds;
  uint32_t counter[4], key[2], words[4];
};

constexpr uint32_t kOnes = 0xffffffffu;
constexpr KnownAnswer kKnown[] = {
    {7, {0, 0, 0, 0}, {0, 0}, {0x5f6fb709, 0x0d893f64, 0x4f121f81, 0x4f730a48}},
    {7, {kOnes, kOnes, kOnes, kOnes}, {kOnes, kOnes}, {0x5207ddc2, 0x45165e59, 0x4d8ee751, 0x8c52f662}},
    {7,
     {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
     {0xa4093822, 0x299f31d0},
     {0x4dfccaba, 0x190a87f0, 0xc47362ba, 0xb6b5242a}},
    {10, {0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
    {10, {kOnes, kOnes, kOnes, kOnes}, {kOnes, kOnes}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
    {10,
     {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
     {0xa4093822, 0x299f31d0},
     {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
};

}  // namespace

int main() {
  using namespace pyzo;
  for (const KnownAnswer& k : kKnown) {
    const uint64_t key = uint64_t(k.key[1]) << 32 | k.key[0];
    const uint64_t low = uint64_t(k.counter[1]) << 32 | k.counter[0],
                   high = uint64_t(k.counter[3]) << 32 | k.counter[2];
    uint32_t got[4];
    if (k.rounds == 7)
      philox_at<7>(got, key, high, low);
    else
      philox_at<10>(got, key, high, low);
    for (int i = 0; i < 4; ++i)
      test::expect(got[i] == k.words[i], "philox4x32-%d: word %d: expected %08x, got %08x", k.rounds, i, k.words[i],
                   got[i]);
  }
  // A counter of the field: block in the low half, key and stream in the high half.
  const Words<uint32_t> w =
      field_words<Scalar>({0x299f31d0a4093822u, 0x0370734413198au}, Stream(0x2e), 0x85a308d3243f6a88u, 0u);
  test::expect(w.x == 0x4dfccabau && w.w == 0xb6b5242au,
               "field_words: expected the third known answer, got %08x .. %08x", w.x, w.w);
  return test::report("philox4x32, known answers of Random123");
}
