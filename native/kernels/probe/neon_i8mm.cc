#define EDGEWISE_NEON neon_i8mm
#include "kernels/probe/neon.inl.h"
