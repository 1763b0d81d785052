#pragma once
// Rademacher signs: element i of a 128-element block is -1 where bit i % 32 of word i / 32 is set, else +1.
#include "core/field.h"

namespace pyzo {

// The sign in the top bit of a word, as a float.
template <class L>
PYZO_HD typename L::F sign_at_top(typename L::U word) {
  return L::sign_at_top(word);
}

}  // namespace pyzo
