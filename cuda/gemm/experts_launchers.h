// The launchers of the kernels for experts, one for each row of tiles.def, which all instantiate
// gemm/sm90/ops/experts.cuh.
#pragma once

#include "sparse24/experts.h"

namespace sparse24::cuda {

template <DType kDType, DType kHidden, GemmTile kTile>
void launch_experts_linear_relu2_sm90(const ExpertsLinearRelu2Args& args, cudaStream_t stream);
template <DType kDType, DType kHidden, GemmTile kTile>
void launch_experts_linear_compress_sm90(const ExpertsLinearCompressArgs& args, cudaStream_t stream);
template <DType kDType, GemmTile kTile>
void launch_experts_linear_sm90(const ExpertsLinearArgs& args, cudaStream_t stream);
template <DType kDType, Major kMajor, GemmTile kTile>
void launch_experts_mm_sm90(const ExpertsMmArgs& args, cudaStream_t stream);
template <DType kDType, GemmTile kTile>
void launch_experts_linear_gradient_sm90(const ExpertsLinearGradientArgs& args, cudaStream_t stream);
template <DType kDType, GemmTile kTile>
void launch_experts_weight_gradient_sm90(const ExpertsWeightGradientArgs& args, cudaStream_t stream);

}  // namespace sparse24::cuda
