// 64-bit keys of (value, index) whose signed order is: larger value first, then lower index. -0.0 counts as 0.0.
#pragma once

#include <cstdint>
#include <cstring>

#include "shared/bits.h"

namespace hpk {

constexpr int64_t kEmptyKey = INT64_MIN;  // below the key of every number

HPK_HOST_DEVICE inline int64_t ordered_key(float value, uint32_t index) {
  int32_t bits;
  const float positive_zero = value + 0.0f;  // -0.0 + 0.0 = 0.0
  std::memcpy(&bits, &positive_zero, 4);
  const int32_t ordered = bits ^ ((bits >> 31) & 0x7fffffff);
  return static_cast<int64_t>(static_cast<uint64_t>(static_cast<uint32_t>(ordered)) << 32 | (0xffffffffu - index));
}

// The value of a number's key.
HPK_HOST_DEVICE inline float key_value(int64_t key) {
  const int32_t ordered = static_cast<int32_t>(key >> 32);
  const int32_t bits = ordered ^ ((ordered >> 31) & 0x7fffffff);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

}  // namespace hpk
