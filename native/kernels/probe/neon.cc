#define EDGEWISE_NEON neon
#include "kernels/probe/neon.inl.h"
