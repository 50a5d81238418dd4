// The extension module edgewise.native._core: one bind function per area.
#include "bindings/bindings.h"

NB_MODULE(_core, m) {
  m.doc() = "Native core of edgewise";
  edgewise::bind_pool(m);
  edgewise::bind_probe(m);
  edgewise::bind_io(m);
  edgewise::bind_kernels(m);
  edgewise::bind_engine(m);
}
