// Threads that run one function together: single program, many threads, barriers between phases.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace edgewise {

class Pool {
 public:
  explicit Pool(size_t threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  size_t threads() const { return threads_; }

  // Runs body(thread) on every thread, the caller being thread 0, and returns when all are done. Not re-entrant.
  void run(const std::function<void(size_t)>& body);

  // Inside body: waits for all threads, and starts the item counter of the next phase at zero.
  void barrier();
  // Inside body: takes the next `count` items of this phase; the caller compares with the number of items.
  size_t take(size_t count) { return next_.fetch_add(count, std::memory_order_relaxed); }

 private:
  void work(size_t thread);
  void wait_for_epoch(uint32_t seen);

  size_t threads_;
  std::vector<std::thread> workers_;
  const std::function<void(size_t)>* body_ = nullptr;
  bool stop_ = false;
  alignas(64) std::atomic<uint32_t> epoch_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<size_t> arrived_{0};
  alignas(64) std::atomic<size_t> next_{0};
};

}  // namespace edgewise
