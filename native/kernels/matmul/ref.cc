#include "edgewise/kernels.h"
#include "kernels/lanes_reference.h"

namespace edgewise::reference {
#include "kernels/matmul/matmul.inl.h"
}  // namespace edgewise::reference
