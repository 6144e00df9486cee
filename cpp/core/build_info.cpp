/// @file
/// The facts that CMake knows, as definitions of this one file.
#include "sparse24/device.h"

namespace sparse24 {

BuildInfo build_info() {
  return {SPARSE24_VERSION, SPARSE24_WITH_CUDA != 0, SPARSE24_CUDA_ARCHS,  SPARSE24_CUDA_VERSION,
          SPARSE24_CUTLASS, SPARSE24_COMPILER,       SPARSE24_TORCH_TARGET};
}

}  // namespace sparse24
