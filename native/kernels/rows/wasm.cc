#include "edgewise/kernels.h"
#include "kernels/lanes_wasm.h"

namespace edgewise::wasm {
#include "kernels/functions.inl.h"
#include "kernels/rows/rows.inl.h"
}  // namespace edgewise::wasm
