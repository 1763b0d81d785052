// Layers of the instruction set "avx2".
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define PYZO_ISA avx2
#define PYZO_LANES 8
#include "cpu/lanes.h"
#include "cpu/layer_kernels.h"

namespace pyzo::cpu {
const Layers layers_avx2 = avx2::kLayers;
}  // namespace pyzo::cpu
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
