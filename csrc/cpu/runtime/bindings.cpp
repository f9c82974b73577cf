#include "cpu/runtime/bindings.h"

#include <pybind11/stl.h>

#include <vector>

#include "cpu/runtime/isa.h"
#include "cpu/runtime/memory.h"
#include "shared/source_hash.h"

namespace hpk {
namespace {

std::vector<BindFunction>& registered() {
  static std::vector<BindFunction> functions;
  return functions;
}

}  // namespace

Registrar::Registrar(BindFunction bind) { registered().push_back(bind); }

}  // namespace hpk

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of hpkernels. Raw pointers: call them through hpkernels.ops.";
  m.attr("source_hash") = hpk::kSourceHash;
  m.def("isa", [] { return hpk::isa_name(hpk::isa()); }, "The instruction set in use.");
  m.def("isas", &hpk::supported_isas, "The instruction sets this machine and this build support, oldest first.");
  m.def("set_isa", &hpk::set_isa, py::arg("name"), "Use the named instruction set from now on (tests and benchmarks).");
  m.def("release_memory", &hpk::release_memory, "Give the scratch memory that is kept for reuse back (tests).");
  m.def("poison_memory", &hpk::poison_memory, py::arg("on"), "Fill scratch memory with NaN before each use (tests).");
  for (hpk::BindFunction bind : hpk::registered())
    bind(m);
}
