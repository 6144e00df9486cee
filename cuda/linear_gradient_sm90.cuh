// The GEMM of linear_gradient for Hopper: dy = grad [M, K] @ w [K, N], w MN-major as nn.Linear stores it.
#pragma once

#include "dense_sm90.cuh"
#include "epilogue_gradient.cuh"
#include "linear_gradient_launchers.h"

namespace sparse24::cuda {

template <DType kDType, DType kMeta>
void launch_linear_gradient_sm90(const LinearGradientArgs& args, const LinearConfig& config, cudaStream_t stream) {
  using Tile = DenseTile<LinearTile::k128x128>;  // a wider one spills
  using Epilogue = cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<
      GradientEpilogue<typename HiddenType<kDType>::type, kMeta == DType::kFloat8E4M3, Tile::kM, Tile::kN>>;
  const GradientParams epilogue{
      int(args.tokens), int(args.features),
      args.y,           args.meta,
      args.dh,          {{args.y_tokens.values, args.y_tokens.meta}, {args.dh_tokens.values, args.dh_tokens.meta}},
      args.counts,      int(args.quarter())};
  // Beyond K both operands read as zeros, whatever lies between the rows of grad.
  const DenseProduct product{args.tokens, args.features, args.in, args.grad, args.ld_grad, args.w, args.features};
  DenseSm90<kDType, Major::kRow, Tile, Epilogue>::launch(product, config, epilogue, stream,
                                                         "sparse24.linear_gradient: launch");
}

}  // namespace sparse24::cuda
