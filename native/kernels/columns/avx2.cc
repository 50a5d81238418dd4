#include "edgewise/kernels.h"
#include "kernels/lanes_avx2.h"

namespace edgewise::avx2 {
#include "kernels/functions.inl.h"
#include "kernels/columns/columns.inl.h"
}  // namespace edgewise::avx2
