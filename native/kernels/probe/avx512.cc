#define EDGEWISE_AVX512 avx512
#include "kernels/probe/avx512.inl.h"
