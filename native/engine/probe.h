// What the processor reaches: streaming reads, int8 and fp32 multiply-adds. For `edgewise device`, never in a model.
#pragma once
#include <cstddef>
#include <vector>

#include "edgewise/cpu.h"

namespace edgewise {

// Bytes per second of `repeats` passes over `bytes` of memory by `threads` threads, each on a stretch of its own.
std::vector<double> probe_read(size_t bytes, int threads, int repeats, Tier tier);

// Operations per second (two per multiply-add) of `threads` threads that multiply for about `seconds`.
double probe_int8(int threads, double seconds, Tier tier);
double probe_fp32(int threads, double seconds, Tier tier);

}  // namespace edgewise
