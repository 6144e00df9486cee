// The GEMM of linear_relu2_gradient for Hopper: dy = grad [M, K] @ w [K, N], w MN-major as nn.Linear stores it.
#pragma once

#include "gemm/linear_relu2_gradient_launchers.h"
#include "gemm/sm90/epilogues/relu2_gradient.cuh"
#include "gemm/sm90/ops/dense.cuh"

namespace sparse24::cuda {

template <DType kDType, GemmTile kTile>
void launch_linear_relu2_gradient_sm90(const LinearRelu2GradientArgs& args, const GemmConfig& config,
                                       cudaStream_t stream) {
  using Tile = DenseTile<kTile>;
  using T = typename CudaType<kDType>::type;
  using Epilogue = cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<
      Relu2GradientEpilogue<T, Tile::kM, Tile::kN>>;
  const Relu2GradientParams<T> epilogue{StoredDerivative<T>(args.roots), int(args.tokens), int(args.features), args.y,
                                        args.dh};
  // Beyond K both operands read as zeros, whatever lies between the rows of grad.
  const DenseProduct product{args.tokens, args.features, args.in, args.grad, args.ld_grad, args.w, args.features};
  DenseSm90<kDType, Major::kRow, Tile, Epilogue>::launch(product, config, epilogue, stream,
                                                         "sparse24.linear_relu2_gradient: launch");
}

}  // namespace sparse24::cuda
