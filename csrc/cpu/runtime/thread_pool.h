// A small thread pool: `parallel_for(threads, tasks, f)` runs f(task, worker) for every task in [0, tasks).
//
//  - Tasks are handed out one by one in ascending order, so give each several tens of microseconds of work.
//  - `worker` is in [0, min(threads, tasks)): use it to index scratch memory and nothing else. A task must write only
//  what
//    it owns and read nothing another task writes; then results do not depend on the number of threads or on timing.
//  - The caller takes part as worker 0. An exception in a task stops the hand-out and is thrown again in the caller.
//  - A parallel_for inside a task runs in that task's thread. Calls from several threads run one after the other.
//  - After fork() the child starts its own threads at its first call.
// Release Python's lock before calling.
#pragma once

#include <cstdint>
#include <type_traits>

namespace hpk {

using TaskFunction = void (*)(void* context, int64_t task, int worker);

void run_tasks(int threads, int64_t tasks, TaskFunction function, void* context);

template <class F>
void parallel_for(int threads, int64_t tasks, F&& f) {
  using Function = std::remove_reference_t<F>;
  run_tasks(
      threads, tasks, [](void* context, int64_t task, int worker) { (*static_cast<Function*>(context))(task, worker); },
      const_cast<std::remove_const_t<Function>*>(&f));
}

}  // namespace hpk
