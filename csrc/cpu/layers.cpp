// Choice of the kernels of layers: those of the instruction set in use.
#include "cpu/layers.h"

#include "cpu/isa.h"

namespace pyzo::cpu {

const Layers& layers(Dtype dtype) {
  if (dtype == kFloat64) return layers_double;
#if defined(__x86_64__)
  if (&isa() == &isa_avx512) return layers_avx512;
  if (&isa() == &isa_avx2) return layers_avx2;
#endif
  return layers_base;
}

}  // namespace pyzo::cpu
