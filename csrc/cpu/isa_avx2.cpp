// Instruction set "avx2": AVX2 + FMA + F16C, 8 lanes.
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
#include "cpu/indexed.h"
#include "cpu/rows.h"

namespace pyzo::cpu {
const Isa isa_avx2 = {
    "avx2",
    [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); },
    avx2::pass,
    avx2::pass_indexed,
    avx2::pass_rows,
    avx2::mask_bits,
    avx2::noise};
}  // namespace pyzo::cpu
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
