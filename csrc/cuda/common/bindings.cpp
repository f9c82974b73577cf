// The module hpkernels._cuda: every op of csrc/cuda adds its functions (see bindings.h).
#include "cuda/common/bindings.h"

#include <vector>

#include "shared/source_hash.h"

namespace hpk::gpu {

static std::vector<BindFunction>& registered() {
  static std::vector<BindFunction> functions;
  return functions;
}

Registrar::Registrar(BindFunction bind) { registered().push_back(bind); }

}  // namespace hpk::gpu

PYBIND11_MODULE(_cuda, m) {
  m.attr("source_hash") = hpk::kSourceHash;
  for (auto bind : hpk::gpu::registered()) bind(m);
}
