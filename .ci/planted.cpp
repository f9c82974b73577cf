// Faults on purpose, each by its name, in memory and threads as the kernels use them: .ci/sanitize has to report every
// one, or it would not see them in a kernel either.
#include <atomic>
#include <cstdint>
#include <iostream>
#include <string>

#include "cpu/runtime/memory.h"
#include "cpu/runtime/thread_pool.h"

int main(int, char** arguments) {
  const std::string fault = arguments[1];
  constexpr size_t bytes = 100'001;  // of a size that is otherwise rounded, and kept for the next call
  volatile char* block = static_cast<char*>(hpk::take_memory(bytes));
  volatile int number = INT32_MAX;
  if (fault == "overrun") block[bytes] = 1;
  hpk::give_memory(const_cast<char*>(block), bytes);
  if (fault == "use-after-give") block[0] = 1;
  if (fault == "overflow") number = number + 1;
  if (fault == "race") {
    std::atomic<int> arrived{0};
    hpk::parallel_for(2, 2, [&](int64_t task, int) {
      arrived.fetch_add(1, std::memory_order_relaxed);
      while (arrived.load(std::memory_order_relaxed) < 2) {  // in two threads, and no order between them
      }
      number = static_cast<int>(task);
    });
  }
  std::cout << fault << " was not seen\n";
}
