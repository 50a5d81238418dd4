#include "edgewise/kernels.h"
#include "kernels/lanes_avx2.h"

namespace edgewise::avx2 {
#include "kernels/matmul/matmul.inl.h"
}  // namespace edgewise::avx2
