#include "edgewise/pool.h"

#include <sys/resource.h>

#include <algorithm>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace edgewise {

namespace {

constexpr uint64_t kStop = 0;  // threads in use, in the last epoch of all

// How often this thread has lost its core to another so far.
long switches_of_this_thread() {
#if defined(RUSAGE_THREAD)
  rusage usage;
  if (getrusage(RUSAGE_THREAD, &usage) == 0) return usage.ru_nivcsw;
#endif
  return 0;
}

}  // namespace

void Pool::pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

void Governor::pass(std::chrono::nanoseconds time) {
  if (limit_ == threads_) return;
  resting_ += time;
  if (resting_ < rest_) return;
  limit_ = threads_;
  window_ = {};
  switches_ = 0;
}

void Governor::observe(std::chrono::nanoseconds elapsed, long switches) {
  if (threads_ == 1) return;
  if (limit_ < threads_) return pass(elapsed);
  window_ += elapsed;
  switches_ += switches;
  if (window_ < kWindow) return;
  const double seconds = std::chrono::duration<double>(window_).count();
  if (static_cast<double>(switches_) > kSwitchesPerSecond * seconds) {
    limit_ = threads_ / 2 > 0 ? threads_ / 2 : 1;
    resting_ = {};
    rest_ = rest_ * 2 < kLongestRest ? rest_ * 2 : std::chrono::nanoseconds(kLongestRest);
  } else {
    rest_ = kFirstRest;
  }
  window_ = {};
  switches_ = 0;
}

Pool::Pool(size_t threads, const Tuning& tuning) : threads_(threads), tuning_(tuning), governor_(threads), stretches_(threads) {
  for (size_t i = 1; i < threads_; ++i) workers_.emplace_back([this, i] { work(i); });
}

Pool::~Pool() {
  epoch_.store(((epoch_.load() >> 8) + 1) << 8 | kStop, std::memory_order_release);
  epoch_.notify_all();
  for (auto& worker : workers_) worker.join();
}

uint64_t Pool::wait_for_epoch(uint64_t seen) {
  for (int spins = 0; spins < tuning_.spins_before_sleep; ++spins) {
    const uint64_t now = epoch_.load(std::memory_order_acquire);
    if (now != seen) return now;
    pause();
  }
  epoch_.wait(seen, std::memory_order_acquire);
  return epoch_.load(std::memory_order_acquire);
}

void Pool::work(size_t thread) {
  for (uint64_t seen = 0;;) {
    seen = wait_for_epoch(seen);
    const uint64_t in_use = seen & 0xFF;
    if (in_use == kStop) return;
    if (thread >= in_use) continue;
    const long before = switches_of_this_thread();
    (*body_)(thread);
    switches_.fetch_add(switches_of_this_thread() - before, std::memory_order_relaxed);
    barrier();
  }
}

void Pool::run(const std::function<void(size_t)>& body) {
  const auto started = std::chrono::steady_clock::now();
  governor_.pass(started - ended_);
  body_ = &body;
  if (timed_) caller_ = std::this_thread::get_id();
  in_use_ = governor_.limit();
  next_.store(0, std::memory_order_relaxed);
  switches_.store(0, std::memory_order_relaxed);
  if (in_use_ > 1) {
    epoch_.store(((epoch_.load(std::memory_order_relaxed) >> 8) + 1) << 8 | in_use_, std::memory_order_release);
    epoch_.notify_all();
  }
  const long before = switches_of_this_thread();
  body(0);
  barrier();
  const long switches = switches_.load(std::memory_order_relaxed) + switches_of_this_thread() - before;
  ended_ = std::chrono::steady_clock::now();
  governor_.observe(ended_ - started, switches);
}

void Pool::share(size_t thread, size_t items) {
  const auto [from, to] = stretch(items, thread, in_use_);
  stretches_[thread].span.store(static_cast<uint64_t>(from) << 32 | to, std::memory_order_release);
}

bool Pool::take_share(size_t thread, size_t least, size_t most, Share& share) {
  for (size_t i = 0; i < in_use_; ++i) {
    const size_t victim = (thread + i) % in_use_;
    std::atomic<uint64_t>& span = stretches_[victim].span;
    for (uint64_t now = span.load(std::memory_order_acquire);;) {
      const size_t from = now >> 32, to = now & 0xFFFFFFFF;
      if (from >= to) break;
      const size_t n = i == 0 ? own_share(to - from, least, most) : std::min(least, to - from);
      share = i == 0 ? Share{from, from + n, true} : Share{to - n, to, false};
      const size_t left_from = i == 0 ? from + n : from, left_to = i == 0 ? to : to - n;
      if (span.compare_exchange_weak(now, static_cast<uint64_t>(left_from) << 32 | left_to, std::memory_order_acq_rel)) return true;
    }
  }
  return false;
}

}  // namespace edgewise
