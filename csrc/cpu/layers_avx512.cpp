// Layers of the instruction set "avx512".
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define PYZO_ISA avx512
#define PYZO_LANES 16
#include "cpu/lanes.h"
#include "cpu/layer_kernels.h"

namespace pyzo::cpu {
const Layers layers_avx512 = avx512::kLayers;
}  // namespace pyzo::cpu
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
