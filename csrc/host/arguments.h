#pragma once
// Arguments of the host module: what Python passed, checked. Every message names the argument, what was expected and
// what came.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "core/field.h"
#include "core/rounding.h"
#include "cpu/isa.h"

namespace pyzo::host {

namespace py = pybind11;

[[noreturn]] inline void fail(const char* name, const std::string& expected, py::handle got, bool type = false) {
  const std::string text =
      std::string(name) + ": expected " + expected + ", got " + py::cast<std::string>(py::repr(got));
  if (type) throw py::type_error(text);
  throw py::value_error(text);
}

// An integer in [0, 2^bits), from anything Python can use as an index. Python's own conversion would not name the
// argument.
inline uint64_t whole(const char* name, py::handle value, int bits) {
  const std::string expected = "an integer in [0, 2**" + std::to_string(bits) + ")";
  const py::object number = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!number) {
    PyErr_Clear();
    fail(name, expected, value, true);
  }
  const unsigned long long n = PyLong_AsUnsignedLongLong(number.ptr());
  const bool overflow = PyErr_Occurred() != nullptr;
  PyErr_Clear();
  if (overflow || (bits < 64 && n >> bits != 0)) fail(name, expected, value);
  return n;
}

// One of a few words; returns its position.
template <size_t kCount>
int choice(const char* name, py::handle value, const char* const (&words)[kCount]) {
  std::string expected;
  for (size_t i = 0; i < kCount; ++i) {
    if (py::isinstance<py::str>(value) && py::cast<std::string>(value) == words[i]) return int(i);
    expected += (i == 0 ? "'" : i + 1 == kCount ? " or '" : ", '") + std::string(words[i]) + "'";
  }
  fail(name, expected, value);
}

// The shard of n elements at offset, whose global indices must stay below 2^63.
inline Shard shard(int64_t n, py::handle offset, py::handle inner, py::handle stride) {
  Shard s = {int64_t(whole("offset", offset, 63)), 0, 0};
  if (inner.is_none() != stride.is_none())
    fail(inner.is_none() ? "inner" : "stride", "a value, since the other is given", py::none());
  int64_t last = s.base, rows = 0;
  bool ok;
  if (inner.is_none()) {
    ok = n == 0 || !__builtin_add_overflow(s.base, n - 1, &last);
  } else {
    s.inner = int64_t(whole("inner", inner, 63)), s.stride = int64_t(whole("stride", stride, 63));
    if (s.inner == 0) fail("inner", "at least 1", inner);
    if (s.stride < s.inner) fail("stride", "at least inner", stride);
    ok = n == 0 || (!__builtin_mul_overflow((n - 1) / s.inner, s.stride, &rows) &&
                    !__builtin_add_overflow(last, rows, &last) && !__builtin_add_overflow(last, s.inner - 1, &last));
  }
  if (!ok) fail("offset", "a shard whose element indices stay below 2**63", offset);
  return s;
}

// The instruction set of that name.
inline const cpu::Isa& instruction_set(const char* argument, py::handle name) {
  std::string expected;
  int count;
  const cpu::Isa* const* all = cpu::all_isas(count);
  for (int i = 0; i < count; ++i) {
    if (!all[i]->supported()) continue;
    if (py::isinstance<py::str>(name) && py::cast<std::string>(name) == all[i]->name) return *all[i];
    expected += (expected.empty() ? "one of this machine's instruction sets '" : "', '") + std::string(all[i]->name);
  }
  fail(argument, expected + "'", name);
}

}  // namespace pyzo::host
