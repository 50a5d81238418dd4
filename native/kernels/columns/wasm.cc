#include "edgewise/kernels.h"
#include "kernels/lanes_wasm.h"

namespace edgewise::wasm {
#include "kernels/functions.inl.h"
#include "kernels/columns/columns.inl.h"
}  // namespace edgewise::wasm
