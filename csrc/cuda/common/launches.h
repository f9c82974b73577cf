// What the declarations of the launches share, <op>/<op>.h: the only part of an op that bindings.cpp, and so the C++
// compiler, sees. Pointers come as integers (tensor.data_ptr()), sizes and strides count elements. Python checks and
// allocates; C++ launches on the caller's device and stream, without waiting.
#pragma once

#include <cstdint>

#if !defined(__CUDACC__) && !defined(__device__)
#define __device__
#endif

namespace hpk::gpu {

struct bf16;
struct fp16;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace hpk::gpu
