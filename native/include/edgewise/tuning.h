// Settings that change how long something takes and never what comes out. engine/tune.py finds them for a machine.
#pragma once
#include <cstddef>

namespace edgewise {

struct Tuning {
  size_t runs_per_thread = 8;           // of a product in prefill: parts that a thread takes one by one, at least
  size_t ahead_nbytes = 6144;           // in decode: how far before its use a weight is fetched, at least
  size_t farthest_nbytes = 128 << 10;   // ... and at most; well within the second-level cache of one core
  int spins_before_yield = 20'000;      // at a barrier: a matrix of a small model takes tens of microseconds
  int spins_before_sleep = 200'000;     // between two calls
};

}  // namespace edgewise
