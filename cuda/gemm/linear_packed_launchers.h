// The compiled kernels of the first GEMM with a 2:4 weight, one translation unit each (tiles.def).
#pragma once

#include "sparse24/packed.h"

namespace sparse24::cuda {

template <DType kDType, DType kPreActivation, DType kY, DType kMeta>
void launch_linear_compress_packed_sm90(const LinearCompressPackedArgs& args, const GemmConfig& config,
                                        cudaStream_t stream);

}  // namespace sparse24::cuda
