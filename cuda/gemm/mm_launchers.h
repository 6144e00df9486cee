// The compiled sparse GEMM kernels: tiles.def lists them, CMake makes one translation unit of each row.
#pragma once

#include "sparse24/mm.h"

namespace sparse24::cuda {

// One kernel. `a_dim` says how A is stored (format.h), `b_major` how B is.
template <DType kDType, Dim kADim, Major kBMajor, GemmTile kTile>
void launch_mm_sm90(const MmArgs& args, const GemmConfig& config, cudaStream_t stream);

}  // namespace sparse24::cuda
