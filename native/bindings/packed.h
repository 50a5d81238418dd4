#pragma once
#include <nanobind/nanobind.h>

#include "edgewise/packed.h"
