// Layers in float64.
#define PYZO_ISA float64
#define PYZO_LANES 1
#include "cpu/double_lanes.h"
#include "cpu/layer_kernels.h"

namespace pyzo::cpu {
const Layers layers_double = float64::kLayers;
}  // namespace pyzo::cpu
