#include "cpu/runtime/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace hpk {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kSpins = 2000;  // about 50 microseconds: bridges the gap between two passes of one op, no more

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

template <class Condition>
bool spin_until(Condition condition) {
  for (int i = 0; i < kSpins; ++i) {
    if (condition()) return true;
    pause();
  }
  return false;
}

thread_local bool inside_task = false;

struct Job {
  TaskFunction function;
  void* context;
  int64_t tasks;
  int threads;
  std::atomic<int64_t> next{0};
  std::exception_ptr error;  // the first one, guarded by error_mutex
  std::mutex error_mutex;

  void work(int worker) {
    inside_task = true;
    try {
      for (int64_t task = next++; task < tasks; task = next++)
        function(context, task, worker);
    } catch (...) {
      next = tasks;
      std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
    inside_task = false;
  }
};

class Pool {
 public:
  void run(Job& job) {
    std::lock_guard<std::mutex> one_at_a_time(run_mutex_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      start(job.threads - 1);
      job_ = &job;
      generation_.fetch_add(1);
    }
    wake_.notify_all();
    job.work(0);
    // A helper that has not woken up by now finds the job gone: nobody waits for it.
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = nullptr;
    }
    if (spin_until([this] { return active_.load() == 0; })) return;
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return active_.load() == 0; });
  }

 private:
  // Where the system has no room for another thread, those there are do the work: results do not depend on how many.
  void start(int helpers) {
    try {
      for (; started_ < helpers; ++started_)
        std::thread([this, worker = started_ + 1] { serve(worker); }).detach();
    } catch (const std::system_error&) {
    }
  }

  void serve(int worker) {
    uint64_t seen = 0;
    while (true) {
      spin_until([&] { return generation_.load() != seen; });
      Job* job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load() != seen; });
        seen = generation_.load();
        job = job_ && worker < job_->threads ? job_ : nullptr;
        if (job) active_.fetch_add(1);
      }
      if (!job) continue;
      job->work(worker);
      std::lock_guard<std::mutex> lock(mutex_);
      if (active_.fetch_sub(1) == 1) done_.notify_all();
    }
  }

  std::mutex run_mutex_, mutex_;
  std::condition_variable wake_, done_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> active_{0};
  Job* job_ = nullptr;
  int started_ = 0;
};

// The pool is never destroyed: its detached threads may outlive static destructors. A forked child has none of the
// parent's threads and perhaps locked mutexes, so it abandons the parent's pool.
std::atomic<Pool*> the_pool{nullptr};

Pool& pool() {
  static const bool registered = [] {
#if !defined(_WIN32)
    pthread_atfork(nullptr, nullptr, [] {
      the_pool = nullptr;
      inside_task = false;
    });
#endif
    return true;
  }();
  static_cast<void>(registered);
  Pool* current = the_pool.load();
  if (current) return *current;
  Pool* fresh = new Pool;
  if (the_pool.compare_exchange_strong(current, fresh)) return *fresh;
  delete fresh;
  return *current;
}

}  // namespace

void run_tasks(int threads, int64_t tasks, TaskFunction function, void* context) {
  threads = static_cast<int>(std::min<int64_t>({threads, tasks, kMaxThreads}));
  if (threads <= 1 || inside_task) {
    for (int64_t task = 0; task < tasks; ++task)
      function(context, task, 0);
    return;
  }
  Job job{function, context, tasks, threads, {}, {}, {}};
  pool().run(job);
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace hpk
