// A tournament of panels: every two of them meet once, and each meets itself, with no two meetings of a panel at a
// time.
//
//     tournament(threads, panels, [&](int64_t first, int64_t second, int worker) { ... });
//
// A meeting may write what belongs to its two panels (first == second: to the one). Each panel meets the others in an
// order that depends on the number of panels alone, so sums that meetings add up have the same bits for any number of
// threads. Meetings that follow each other are of a few panels, which stay in the cache that threads share.
#pragma once

#include <cstdint>
#include <type_traits>

namespace hpk {

// `worker` is in [0, threads), as parallel_for has it. A meeting must not throw: others may be waiting for it.
using MeetFunction = void (*)(void* context, int64_t first, int64_t second, int worker);

void run_tournament(int threads, int64_t panels, MeetFunction function, void* context);

template <class F>
void tournament(int threads, int64_t panels, F&& f) {
  using Function = std::remove_reference_t<F>;
  run_tournament(
      threads, panels,
      [](void* context, int64_t first, int64_t second, int worker) {
        (*static_cast<Function*>(context))(first, second, worker);
      },
      const_cast<std::remove_const_t<Function>*>(&f));
}

}  // namespace hpk
