// What the extension was built for. hpkernels/dispatch.py decides from it whether a device can run the kernels.
#include "cuda/common/bindings.h"
#include "cuda/common/primitives.h"

#ifndef HPK_CUDA_ARCHS
#define HPK_CUDA_ARCHS ""
#endif

HPK_BIND_CUDA(device) {
  m.attr("device_type") = hpk::gpu::kDeviceType;       // of the tensors it takes, as torch names it
  m.attr("archs") = HPK_CUDA_ARCHS;                    // "sm_80;compute_90": machine code and PTX
  m.attr("cuda_version") = hpk::gpu::kCudaVersion;     // 1000 major + 10 minor, as CUDA counts
  m.def("driver_version", &hpk::gpu::driver_version);  // likewise; 0 without a driver
}
