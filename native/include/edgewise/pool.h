// Threads that run one function together: single program, many threads, barriers between phases.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <thread>
#include <utility>
#include <vector>

#include "edgewise/tuning.h"

namespace edgewise {

// How many threads to use while others want the processor too. A thread that loses its core in the middle of a phase
// makes all the others wait for it, often for longer than the whole pass takes on one thread. The kernel counts such
// losses (involuntary context switches): above a rate that a machine of one's own never shows, half of the threads rest
// for a while, then all are tried again. Results do not depend on the number of threads, so nothing but time changes.
class Governor {
 public:
  explicit Governor(size_t threads) : threads_(threads), limit_(threads) {}
  size_t limit() const { return limit_; }
  // Time in which nothing ran: a rest goes by in it too.
  void pass(std::chrono::nanoseconds time);
  // After each run: how long it took and how often its threads lost their core meanwhile.
  void observe(std::chrono::nanoseconds elapsed, long switches);

 private:
  size_t threads_, limit_;
  std::chrono::nanoseconds window_{0}, resting_{0}, rest_{kFirstRest};
  long switches_ = 0;

  static constexpr std::chrono::milliseconds kWindow{100}, kFirstRest{125}, kLongestRest{4000};
  static constexpr double kSwitchesPerSecond = 150;  // of all threads together; a quiet machine shows about ten
};

class Pool {
 public:
  explicit Pool(size_t threads, const Tuning& tuning = {});
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  size_t threads() const { return threads_; }

  // Runs body(thread) on the threads in use, the caller being thread 0, and returns when all are done. Not re-entrant.
  void run(const std::function<void(size_t)>& body);

  size_t in_use() const { return in_use_; }

  // How long the thread that calls run() has waited at barriers, while that is timed.
  void time_waits(bool on) { timed_ = on; }
  std::chrono::nanoseconds waited() const { return waited_; }

  // Inside body: waits for all threads in use, and starts the item counter of the next phase at zero. idle() is called
  // over and over meanwhile.
  template <class Idle>
  void barrier(Idle idle);
  void barrier() { barrier([] {}); }
  // Inside body: takes the next `count` items of this phase; the caller compares with the number of items.
  size_t take(size_t count) { return next_.fetch_add(count, std::memory_order_relaxed); }

  // Inside body, for phases whose threads know beforehand what they will read: items are split into one stretch per
  // thread. A thread takes from the front of its own; once that is empty, from the back of the others'.
  struct Share {
    size_t from, to;
    bool own;
  };
  static std::pair<size_t, size_t> stretch(size_t items, size_t thread, size_t threads) {
    return {items * thread / threads, items * (thread + 1) / threads};
  }
  void share(size_t thread, size_t items);
  // What a thread takes of its own stretch while `left` items are in it: much at first, as few as `least` at the end, so
  // that it seldom asks and all end together.
  static size_t own_share(size_t left, size_t least, size_t most) { return std::min(left, std::clamp(left / 3, least, most)); }
  // At most `most` of the thread's own, or `least` of another's. False when nothing is left.
  bool take_share(size_t thread, size_t least, size_t most, Share& share);

 private:
  struct alignas(64) Stretch {
    std::atomic<uint64_t> span{0};  // first item above, end below
  };

  void work(size_t thread);
  static void pause();
  uint64_t wait_for_epoch(uint64_t seen);

  size_t threads_;
  Tuning tuning_;
  Governor governor_;
  bool timed_ = false;
  std::thread::id caller_{};
  std::chrono::nanoseconds waited_{0};
  std::vector<std::thread> workers_;
  std::vector<Stretch> stretches_;
  const std::function<void(size_t)>* body_ = nullptr;
  size_t in_use_ = 1;
  std::chrono::steady_clock::time_point ended_{};
  // Number of the run, and in the low byte how many threads take part: one word, so that both are seen together.
  alignas(64) std::atomic<uint64_t> epoch_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<size_t> arrived_{0};
  alignas(64) std::atomic<size_t> next_{0};
  alignas(64) std::atomic<long> switches_{0};
};

template <class Idle>
void Pool::barrier(Idle idle) {
  if (in_use_ == 1) {
    next_.store(0, std::memory_order_relaxed);
    return;
  }
  const bool timed = timed_ && std::this_thread::get_id() == caller_;
  const auto started = timed ? std::chrono::steady_clock::now() : std::chrono::steady_clock::time_point{};
  const uint32_t generation = generation_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == in_use_) {
    arrived_.store(0, std::memory_order_relaxed);
    next_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
    if (spins < tuning_.spins_before_yield) {
      idle();
      pause();
    } else {
      std::this_thread::yield();
    }
  }
  if (timed) waited_ += std::chrono::steady_clock::now() - started;
}

}  // namespace edgewise
