// Instruction set "avx512": AVX-512 F, BW, DQ, VL, 16 lanes.
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
#include "cpu/indexed.h"
#include "cpu/rows.h"

namespace pyzo::cpu {
const Isa isa_avx512 = {"avx512",
                        [] {
                          return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
                        },
                        avx512::pass,
                        avx512::pass_indexed,
                        avx512::pass_rows,
                        avx512::mask_bits,
                        avx512::noise};
}  // namespace pyzo::cpu
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
