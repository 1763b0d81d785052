#pragma once
// The kernels of layers of one instruction set as a table of functions. No torch: raw pointers, the caller supplies the
// threads.
#include "body/dropout.h"
#include "body/gate.h"
#include "body/norm.h"

namespace pyzo::cpu {

// Elements are handled in tiles, which hold whole bytes of codes.
constexpr int64_t kLayerTile = 1024;

// Partial sums of a row of a norm, and the length of its tables: whole groups of as many columns.
constexpr int64_t kNormSums = 32;
constexpr int64_t norm_stride(int64_t columns) { return (columns + kNormSums - 1) / kNormSums * kNormSums; }
// Tiles of one row of a gate.
constexpr int64_t gate_tiles(int64_t columns) { return (columns + kLayerTile - 1) / kLayerTile; }

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
  // Tiles [begin, end) of rows x gate_tiles(columns).
  void (*gate)(const GateArgs&, int function, int64_t begin, int64_t end);
  void (*gate_backward)(const GateArgs&, int function, int64_t begin, int64_t end);
  // Kernels of norms handle rows [begin, end). Sums over rows are added to dweight and dbias, which may be null.
  void (*norm_tables)(const NormArgs&, void* tables);  // 3 * norm_stride numbers
  void (*norm)(const NormArgs&, const NormForward&, const void* tables, int64_t begin, int64_t end);
  void (*norm_backward)(const NormArgs&, const NormBackward&, const void* tables, void* dweight, void* dbias,
                        int64_t begin, int64_t end);
  void (*norm_sum)(const void* partial, int64_t blocks, int64_t stride, Dtype dtype, void* out, int64_t columns);
};

extern const Layers layers_base, layers_avx2, layers_avx512, layers_double;

// Those of the instruction set in use (cpu/isa.h), or of float64, which has no vectors.
const Layers& layers(Dtype dtype);

}  // namespace pyzo::cpu
