// Layers of the instruction set "base": whatever every CPU of the architecture has.
#define PYZO_ISA base
#define PYZO_LANES 4
#include "cpu/lanes.h"
#include "cpu/layer_kernels.h"

namespace pyzo::cpu {
const Layers layers_base = base::kLayers;
}  // namespace pyzo::cpu
