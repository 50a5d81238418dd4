#define EDGEWISE_AVX512 avx512_bf16
#include "edgewise/kernels.h"
#include "kernels/lanes_avx512.h"

namespace edgewise::avx512_bf16 {
#include "kernels/functions.inl.h"
#include "kernels/columns/columns.inl.h"
}  // namespace edgewise::avx512_bf16
