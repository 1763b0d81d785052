// Choice of the instruction set.
#include "cpu/isa.h"

#include <cstring>

namespace pyzo::cpu {
namespace {

#if defined(__x86_64__)
const Isa* const kIsas[] = {&isa_avx512, &isa_avx2, &isa_base};  // best first
#else
const Isa* const kIsas[] = {&isa_base};
#endif

const Isa* best() {
  for (const Isa* i : kIsas)
    if (i->supported()) return i;
  return &isa_base;
}

const Isa*& current() {
  static const Isa* chosen = best();
  return chosen;
}

}  // namespace

const Isa& isa() { return *current(); }

bool select_isa(const char* name) {
  if (!*name) {
    current() = best();
    return true;
  }
  for (const Isa* i : kIsas)
    if (!std::strcmp(i->name, name) && i->supported()) {
      current() = i;
      return true;
    }
  return false;
}

const Isa* const* all_isas(int& count) {
  count = int(sizeof kIsas / sizeof *kIsas);
  return kIsas;
}

}  // namespace pyzo::cpu
