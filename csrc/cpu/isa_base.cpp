// Instruction set "base": whatever every CPU of the architecture has (fma in software where there is none).
#define PYZO_ISA base
#define PYZO_LANES 4
#include "cpu/indexed.h"
#include "cpu/rows.h"

namespace pyzo::cpu {
const Isa isa_base = {"base",          [] { return true; }, base::pass, base::pass_indexed,
                      base::pass_rows, base::mask_bits,     base::noise};
}  // namespace pyzo::cpu
