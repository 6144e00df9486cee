// The compiled first-GEMM kernels, one translation unit each (tiles.def).
#pragma once

#include "sparse24/linear.h"

namespace sparse24::cuda {

template <DType kDType, DType kPreActivation, DType kY, GemmTile kTile>
void launch_linear_relu2_sm90(const LinearRelu2Args& args, const GemmConfig& config, cudaStream_t stream);

template <DType kDType, DType kPreActivation, DType kY, DType kMeta, GemmTile kTile>
void launch_linear_compress_sm90(const LinearCompressArgs& args, const GemmConfig& config, cudaStream_t stream);

// The library's choice; SPARSE24_LINEAR_CONFIG="tile,swizzle,m|n" overrides it: tile is an index into linear_configs.
// For tuning.
GemmConfig choose_linear_config(DType dtype, int64_t m, int64_t n, int64_t k, const LinearTiles& tiles);

}  // namespace sparse24::cuda
