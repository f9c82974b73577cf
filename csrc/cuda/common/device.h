// What the extension was built for. hpkernels/dispatch.py decides from it whether a device can run the kernels.
#pragma once

namespace hpk::gpu {

const char* device_type();  // of the tensors it takes, as torch names it
int cuda_version();         // 1000 major + 10 minor, as CUDA counts
int driver_version();       // likewise; 0 without a driver. Throws std::runtime_error.

}  // namespace hpk::gpu
