#include "cpu/memory.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

namespace hpk {
namespace {

constexpr size_t kSmall = 64 << 10;  // below this the system's allocator keeps pages itself
constexpr size_t kKept = 8 << 20;  // more would stand beside the loss's own peak

struct Block {
  void* address;
  size_t capacity;
};

// Never destroyed: detached threads may still return memory while the process ends.
struct Cache {
  std::mutex mutex;
  std::vector<Block> blocks;  // from the least to the most recently returned
  size_t total = 0;
};

Cache& cache() {
  static Cache* const instance = new Cache;
  return *instance;
}

std::atomic<bool> poison{false};

// Sizes in steps of an eighth of their magnitude, so that slightly different calls share blocks.
size_t capacity_for(size_t bytes) {
  size_t step = 64;
  while (bytes >= kSmall && step * 16 <= bytes)
    step *= 2;
  return (bytes + step - 1) / step * step;
}

void* take_cached(size_t capacity) {
  // A lock that is held, perhaps since a fork, is not worth waiting for.
  Cache& kept = cache();
  std::unique_lock<std::mutex> lock(kept.mutex, std::try_to_lock);
  if (!lock.owns_lock()) return nullptr;
  for (size_t n = kept.blocks.size(); n-- > 0;) {
    const Block block = kept.blocks[n];
    if (block.capacity != capacity) continue;
    kept.blocks.erase(kept.blocks.begin() + static_cast<std::ptrdiff_t>(n));
    kept.total -= capacity;
    return block.address;
  }
  return nullptr;
}

}  // namespace

void* take_memory(size_t bytes) {
  const size_t capacity = capacity_for(bytes ? bytes : 1);
  void* block = capacity >= kSmall ? take_cached(capacity) : nullptr;
  if (!block) block = std::aligned_alloc(64, capacity);
  if (!block) throw std::bad_alloc();
  if (poison) std::memset(block, 0xff, capacity);
  return block;
}

void give_memory(void* block, size_t bytes) {
  const size_t capacity = capacity_for(bytes ? bytes : 1);
  if (capacity < kSmall || capacity > kKept) return std::free(block);
  Cache& kept = cache();
  std::unique_lock<std::mutex> lock(kept.mutex, std::try_to_lock);
  if (!lock.owns_lock()) return std::free(block);
  kept.blocks.push_back({block, capacity});
  kept.total += capacity;
  while (kept.total > kKept) {
    std::free(kept.blocks.front().address);
    kept.total -= kept.blocks.front().capacity;
    kept.blocks.erase(kept.blocks.begin());
  }
}

void poison_memory(bool on) { poison = on; }

}  // namespace hpk
