// The module hpkernels._cpu. In one file: pybind11 takes seconds in each that has it.
#include <pybind11/stl.h>

#include "cpu/cluster_assign/bindings.h"
#include "cpu/contrastive/bindings.h"
#include "cpu/local_mix/bindings.h"
#include "cpu/normalize/bindings.h"
#include "cpu/pair_bits/bindings.h"
#include "cpu/products/bindings.h"
#include "cpu/runtime/isa.h"
#include "cpu/runtime/memory.h"
#include "cpu/similarity_search/bindings.h"
#include "shared/source_hash.h"

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of hpkernels. Raw pointers: call them through hpkernels.ops.";
  m.attr("source_hash") = hpk::kSourceHash;
  m.def("isa", [] { return hpk::isa_name(hpk::isa()); }, "The instruction set in use.");
  m.def("isas", &hpk::supported_isas, "The instruction sets this machine and this build support, oldest first.");
  m.def("set_isa", &hpk::set_isa, py::arg("name"), "Use the named instruction set from now on (tests and benchmarks).");
  m.def("release_memory", &hpk::release_memory, "Give the scratch memory that is kept for reuse back (tests).");
  m.def("poison_memory", &hpk::poison_memory, py::arg("on"), "Fill scratch memory with NaN before each use (tests).");
  hpk::cluster_assign_bindings::bind(m);
  hpk::contrastive_bindings::bind(m);
  hpk::local_mix_bindings::bind(m);
  hpk::normalize_bindings::bind(m);
  hpk::pair_bits_bindings::bind(m);
  hpk::products_bindings::bind(m);
  hpk::similarity_search_bindings::bind(m);
}
