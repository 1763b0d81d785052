// The module pyzo._host: the noise field on NumPy arrays, from the same core as the operators, without torch.
#include <vector>

#include "host/arguments.h"

namespace pyzo::host {
namespace {

py::array noise(py::object n, py::object seed, py::object key, py::object offset, py::object inner, py::object stride,
                py::object distribution, py::object dtype, py::object isa) {
  const int64_t count = int64_t(whole("n", n, 63));
  const Source source = {whole("seed", seed, 64), whole("key", key, 56)};
  const Shard rectangle = shard(count, offset, inner, stride);
  const int which = choice("distribution", distribution, {"normal", "rademacher"});
  const int storage = choice("dtype", dtype, {"float32", "bfloat16", "float16"});  // in the order of Dtype
  const cpu::Isa& body = isa.is_none() ? cpu::isa() : instruction_set("isa", isa);
  const char* const numpy[] = {"float32", "uint16", "float16"};
  py::array out{py::dtype(numpy[storage]), std::vector<py::ssize_t>{count}};
  void* const data = out.mutable_data();
  if (count > 0) {
    py::gil_scoped_release release;
    body.noise(source, rectangle, which, Dtype(storage), data, 0, count);
  }
  return out;
}

py::array_t<uint32_t> philox_words(py::object seed, py::object high, py::object block, py::object n,
                                   py::object rounds) {
  const uint64_t key = whole("seed", seed, 64), upper = whole("high", high, 64), first = whole("block", block, 64);
  const int64_t count = int64_t(whole("n", n, 59));  // of 16 bytes each
  const uint64_t depth = whole("rounds", rounds, 64);
  if (depth != 7 && depth != 10) fail("rounds", "7 (the noise field's) or 10", rounds);
  py::array_t<uint32_t> out(std::vector<py::ssize_t>{count, 4});
  uint32_t* words = out.mutable_data();
  py::gil_scoped_release release;
  for (int64_t i = 0; i < count; ++i, words += 4) {
    if (depth == 7)
      philox_at<7>(words, key, upper, first + uint64_t(i));
    else
      philox_at<10>(words, key, upper, first + uint64_t(i));
  }
  return out;
}

uint64_t seed_of(py::object run, py::object t, py::object k) {
  return direction_seed(whole("run", run, 64), whole("t", t, 64), whole("k", k, 64));
}

py::list isas() {
  py::list names;
  int count;
  const cpu::Isa* const* all = cpu::all_isas(count);
  for (int i = 0; i < count; ++i)
    if (all[i]->supported()) names.append(all[i]->name);
  return names;
}

void select_isa(py::object name) {
  const bool best = py::isinstance<py::str>(name) && py::cast<std::string>(name).empty();
  cpu::select_isa(best ? "" : instruction_set("name", name).name);
}

}  // namespace
}  // namespace pyzo::host

PYBIND11_MODULE(_host, m) {
  namespace host = pyzo::host;
  namespace py = pybind11;
  m.doc() = "The noise field on NumPy arrays, without torch: the bits of the operators.";
  m.attr("noise_version") = pyzo::kNoiseVersion;
  m.def("noise", &host::noise, py::arg("n"), py::kw_only(), py::arg("seed"), py::arg("key"), py::arg("offset") = 0,
        py::arg("inner") = py::none(), py::arg("stride") = py::none(), py::arg("distribution") = "normal",
        py::arg("dtype") = "float32", py::arg("isa") = py::none(),
        "The n elements of tensor key's noise under seed that a shard holds: element i is z at index\n"
        "offset + i, or offset + (i // inner) * stride + i % inner where inner and stride are given.\n\n"
        "Args: seed in [0, 2**64), key in [0, 2**56), indices below 2**63; distribution 'normal' or 'rademacher';\n"
        "dtype 'float32', 'float16' or 'bfloat16' (as uint16 codes; NumPy has no such type), rounded to nearest;\n"
        "isa: name of the instruction set to compute with (the result never depends on it), None for the one in use.\n"
        "Returns: array [n]. Raises ValueError or TypeError, naming the argument.\n"
        "Philox4x32-7 (Salmon et al., SC'11) and Box-Muller; noise version noise_version.");
  m.def("philox", &host::philox_words, py::arg("seed"), py::arg("high"), py::arg("block"), py::arg("n"),
        py::arg("rounds") = 7,
        "Philox4x32 words under the 64-bit key seed, of the n 128-bit counters (high, block + i); block wraps at "
        "2**64.\n\n"
        "Args: rounds 7 or 10. Returns: uint32 array [n, 4] (Salmon et al., SC'11).");
  m.def("direction_seed", &host::seed_of, py::arg("run"), py::arg("t"), py::arg("k"),
        "Seed of direction k of step t of a run, an integer in [0, 2**64); so are the arguments.");
  m.def("isas", &host::isas, "Names of the instruction sets this machine can run, best first.");
  m.def("select_isa", &host::select_isa, py::arg("name"),
        "Compute with this instruction set from now on, '' for the best one. ValueError where the machine lacks it.");
}
