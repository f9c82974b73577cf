#include "cpu/runtime/memory.h"

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace hpk {
namespace {

#if defined(__SANITIZE_ADDRESS__)  // knows the end and the last use of a block that is as asked for and not kept
constexpr size_t kStep = 1, kSmall = SIZE_MAX;
#else
constexpr size_t kStep = 64;
constexpr size_t kSmall = 64 << 10;  // below this the system's allocator keeps pages itself
#endif
constexpr size_t kKept = 8 << 20;  // more would stand beside the loss's own peak
constexpr size_t kHuge = 2 << 20;  // a huge page

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

// Becomes Python's MemoryError. Its text is made beforehand: there may be no memory for it later.
class NoMemory : public std::bad_alloc {
 public:
  explicit NoMemory(size_t bytes) noexcept {
    std::snprintf(text_, sizeof text_, "hpkernels: no memory for %zu bytes of scratch space", bytes);
  }
  const char* what() const noexcept override { return text_; }

 private:
  char text_[96];
};

std::atomic<bool> poison{false};

// Sizes in steps of an eighth of their magnitude, so that slightly different calls share blocks.
size_t capacity_for(size_t bytes) {
  size_t step = kStep;
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

void* fresh(size_t capacity) {
  void* block = nullptr;
#if defined(__linux__)
  if (capacity >= 2 * kHuge && kStep > 1) {  // not where the end of a block is watched to the byte
    if (posix_memalign(&block, kHuge, capacity)) return nullptr;
    madvise(block, capacity / kHuge * kHuge, MADV_HUGEPAGE);  // one fault instead of 512, fewer misses of the TLB
    return block;
  }
#endif
  return posix_memalign(&block, 64, capacity) ? nullptr : block;
}

}  // namespace

void* take_memory(size_t bytes) {
  const size_t capacity = capacity_for(bytes ? bytes : 1);
  void* block = capacity >= kSmall ? take_cached(capacity) : nullptr;
  if (!block) {
    block = fresh(capacity);
    if (!block) release_memory();
    if (!block) block = fresh(capacity);
    if (!block) throw NoMemory(capacity);
  }
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

void release_memory() {
  Cache& kept = cache();
  std::unique_lock<std::mutex> lock(kept.mutex, std::try_to_lock);
  if (!lock.owns_lock()) return;
  for (const Block& block : kept.blocks)
    std::free(block.address);
  kept.blocks.clear();
  kept.total = 0;
}

void poison_memory(bool on) { poison = on; }

}  // namespace hpk
