#include "edgewise/kernels.h"
#include "kernels/lanes_wasm.h"

namespace edgewise::wasm {
#include "kernels/functions.inl.h"
#include "kernels/attention/attention.inl.h"
}  // namespace edgewise::wasm
