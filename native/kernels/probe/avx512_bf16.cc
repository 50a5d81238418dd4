#define EDGEWISE_AVX512 avx512_bf16
#include "kernels/probe/avx512.inl.h"
