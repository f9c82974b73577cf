// What the tests set of the host's launches.
#include "cuda/common/bindings.h"
#include "cuda/common/primitives.h"

HPK_BIND_CUDA(shim) {
  m.def("run_last_blocks", [](unsigned count) { hpk::shim::last_blocks() = count; });
}
