#include "edgewise/kernels.h"
#include "kernels/lanes_wasm.h"

namespace edgewise::wasm {
#include "kernels/matmul/matmul.inl.h"
}  // namespace edgewise::wasm
