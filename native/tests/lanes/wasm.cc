#include "tests/lanes/lanes.h"
#include "kernels/lanes_wasm.h"

namespace edgewise::wasm {
#include "tests/lanes/lanes.inl.h"
}  // namespace edgewise::wasm
