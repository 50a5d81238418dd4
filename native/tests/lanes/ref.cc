#include "tests/lanes/lanes.h"
#include "kernels/lanes_reference.h"

namespace edgewise::reference {
#include "tests/lanes/lanes.inl.h"
}  // namespace edgewise::reference
