#include "edgewise/kernels.h"
#include "kernels/lanes_reference.h"

namespace edgewise::reference {
#include "kernels/functions.inl.h"
#include "kernels/rows/rows.inl.h"
}  // namespace edgewise::reference
