#include "edgewise/kernels.h"
#include "kernels/lanes_reference.h"

namespace edgewise::reference {
#include "kernels/functions.inl.h"
#include "kernels/attention/attention.inl.h"
}  // namespace edgewise::reference
