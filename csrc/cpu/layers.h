#pragma once
// The kernels of layers of one instruction set as a table of functions. No torch: raw pointers, the caller supplies the
// threads.
#include "body/activation.h"
#include "body/dropout.h"

namespace pyzo::cpu {

// Elements are handled in tiles, which hold whole bytes of codes.
constexpr int64_t kLayerTile = 1024;

// Elementwise kernels handle elements [begin, end); begin is a multiple of the tile.
struct Layers {
  void (*activation)(const Elements&, int function, int64_t begin, int64_t end);
  void (*activation_backward)(const Elements&, int function, int64_t begin, int64_t end);  // in: gradient, x
  void (*coded_activation)(const Elements&, int function, const Levels& thresholds, uint8_t* codes, int64_t begin,
                           int64_t end);
  void (*coded_activation_backward)(const Elements&, const Levels& slopes, const uint8_t* codes, int64_t begin,
                                    int64_t end);
  // in: gradient, y
  void (*output_activation_backward)(const Elements&, int function, const uint8_t* sides, int64_t begin, int64_t end);
  void (*dropout)(const Elements&, const Dropout&, uint64_t seed, int64_t begin, int64_t end);
};

extern const Layers layers_base, layers_avx2, layers_avx512, layers_double;

// Those of the instruction set in use (cpu/isa.h), or of float64, which has no vectors.
const Layers& layers(Dtype dtype);

}  // namespace pyzo::cpu
