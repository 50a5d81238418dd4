#include "engine/probe.h"

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <stdexcept>
#include <thread>

#include "kernels/probe/probe.h"

namespace edgewise {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

struct Loops {
  uint64_t (*read)(const void*, size_t);
  double (*int8)(int64_t);
  double (*fp32)(int64_t);
  double int8_ops, fp32_ops;
};

Loops loops_of(Tier tier) {
  if (tier > best_tier())
    throw std::invalid_argument(std::string("this processor runs at most ") + tier_name(best_tier()) +
                                "; asked for " + tier_name(tier));
  switch (tier) {
#define EDGEWISE_TIER(tier, name) \
  case Tier::tier:                \
    return {probe::read_##name, probe::int8_##name, probe::fp32_##name, probe::int8_ops_##name, probe::fp32_ops_##name};
#include "edgewise/tiers.inc"
#undef EDGEWISE_TIER
  }
  throw std::invalid_argument("unknown instruction tier");
}

// Runs work(thread) on all threads at once and returns the seconds from the common start to the last end.
double together(int threads, const std::function<void(int)>& work) {
  std::atomic<int> ready{0};
  std::atomic<bool> go{false};
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t)
    pool.emplace_back([&, t] {
      ++ready;
      while (!go.load(std::memory_order_acquire)) std::this_thread::yield();
      work(t);
    });
  while (ready.load() < threads) std::this_thread::yield();
  auto start = Clock::now();
  go.store(true, std::memory_order_release);
  for (auto& thread : pool) thread.join();
  return seconds_since(start);
}

void check_threads(int threads) {
  if (threads < 1 || threads > 1024)
    throw std::invalid_argument("threads is 1 to 1024; given " + std::to_string(threads));
}

double multiply(int threads, double seconds, double (*loop)(int64_t), double ops) {
  check_threads(threads);
  if (!(seconds > 0 && seconds <= 60)) throw std::invalid_argument("seconds is above 0 and at most 60");
  constexpr int64_t kRounds = 20000;
  std::atomic<int64_t> rounds{0};
  std::atomic<double> sink{0};
  loop(kRounds);  // wakes the wide units
  double elapsed = together(threads, [&](int) {
    auto start = Clock::now();
    int64_t done = 0;
    double sum = 0;
    for (; done == 0 || seconds_since(start) < seconds; done += kRounds) sum += loop(kRounds);
    rounds += done;
    sink.store(sum);
  });
  return static_cast<double>(rounds.load()) * ops / elapsed;
}

}  // namespace

std::vector<double> probe_read(size_t bytes, int threads, int repeats, Tier tier) {
  check_threads(threads);
  if (repeats < 1) throw std::invalid_argument("repeats is at least 1; given " + std::to_string(repeats));
  const size_t part = bytes / threads / 1024 * 1024;
  if (part == 0) throw std::invalid_argument("bytes is at least 1024 per thread; given " + std::to_string(bytes));
  const Loops loops = loops_of(tier);
  std::vector<std::unique_ptr<void, decltype(&std::free)>> memory;
  for (int t = 0; t < threads; ++t) {
    memory.emplace_back(std::aligned_alloc(1024, part), &std::free);
    if (memory.back() == nullptr) throw std::bad_alloc();
  }
  // Each thread touches its own stretch first, so that it lies near that thread; written, so that pages are distinct.
  together(threads, [&](int t) { std::memset(memory[t].get(), t + 1, part); });
  std::atomic<uint64_t> sink{0};
  std::vector<double> rates;
  for (int r = 0; r < repeats; ++r) {
    double elapsed = together(threads, [&](int t) { sink ^= loops.read(memory[t].get(), part); });
    rates.push_back(static_cast<double>(part) * threads / elapsed);
  }
  return rates;
}

double probe_int8(int threads, double seconds, Tier tier) {
  const Loops loops = loops_of(tier);
  return multiply(threads, seconds, loops.int8, loops.int8_ops);
}

double probe_fp32(int threads, double seconds, Tier tier) {
  const Loops loops = loops_of(tier);
  return multiply(threads, seconds, loops.fp32, loops.fp32_ops);
}

}  // namespace edgewise
