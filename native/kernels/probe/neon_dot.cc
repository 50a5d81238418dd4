#define EDGEWISE_NEON neon_dot
#include "kernels/probe/neon.inl.h"
