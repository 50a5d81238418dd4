#include "edgewise/pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace edgewise {

namespace {

// A matrix of a small model takes tens of microseconds: waiting threads spin for that long before they give way.
constexpr int kSpinsBeforeYield = 20'000;
constexpr int kSpinsBeforeSleep = 200'000;

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

}  // namespace

Pool::Pool(size_t threads) : threads_(threads) {
  for (size_t i = 1; i < threads_; ++i) workers_.emplace_back([this, i] { work(i); });
}

Pool::~Pool() {
  stop_ = true;
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void Pool::wait_for_epoch(uint32_t seen) {
  for (int spins = 0; spins < kSpinsBeforeSleep; ++spins) {
    if (epoch_.load(std::memory_order_acquire) != seen) return;
    pause();
  }
  epoch_.wait(seen, std::memory_order_acquire);
}

void Pool::work(size_t thread) {
  for (uint32_t seen = 0;;) {
    wait_for_epoch(seen);
    seen = epoch_.load(std::memory_order_acquire);
    if (stop_) return;
    (*body_)(thread);
    barrier();
  }
}

void Pool::run(const std::function<void(size_t)>& body) {
  body_ = &body;
  next_.store(0, std::memory_order_relaxed);
  if (threads_ > 1) {
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
  }
  body(0);
  barrier();
}

void Pool::barrier() {
  if (threads_ == 1) {
    next_.store(0, std::memory_order_relaxed);
    return;
  }
  const uint32_t generation = generation_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
    arrived_.store(0, std::memory_order_relaxed);
    next_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
    if (spins < kSpinsBeforeYield)
      pause();
    else
      std::this_thread::yield();
  }
}

}  // namespace edgewise
