#include "cuda/common/device.h"

#include "cuda/common/primitives.h"

namespace hpk::gpu {

const char* device_type() { return kDeviceType; }
int cuda_version() { return kCudaVersion; }
int driver_version() { return newest_version_served(); }

}  // namespace hpk::gpu
