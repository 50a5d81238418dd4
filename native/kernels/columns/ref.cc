#include "edgewise/kernels.h"
#include "kernels/lanes_reference.h"

namespace edgewise::reference {
#include "kernels/functions.inl.h"
#include "kernels/columns/columns.inl.h"
}  // namespace edgewise::reference
