// The GEMM of linear_relu2_gradient_fp8 for Hopper: dy = grad [M, K] @ w.T, w [N, K], both K-major as float8 has to be.
#pragma once

#include "gemm/linear_relu2_gradient_fp8_launchers.h"
#include "gemm/sm90/epilogues/relu2_gradient_fp8.cuh"
#include "gemm/sm90/mainloops/grouped_rows.cuh"
#include "gemm/sm90/ops/dense.cuh"

namespace sparse24::cuda {

template <DType kDType>
void launch_linear_relu2_gradient_fp8_sm90(const LinearRelu2GradientFp8Args& args, const GemmConfig& config,
                                           cudaStream_t stream) {
  using Tile = DenseTile<kLinearGradientTile>;
  using Epilogue = Relu2GradientFp8Epilogue<Tile::kM, Tile::kN>;
  using Gemm =
      DenseSm90<kDType, Major::kColumn, Tile,
                cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<Epilogue>, GroupedRowsMainloop>;
  const Relu2GradientFp8Params epilogue{
      int(args.tokens),
      int(args.features),
      static_cast<const uint8_t*>(args.y),
      static_cast<uint8_t*>(args.dh),
      static_cast<uint8_t*>(args.y_transposed),
      static_cast<uint8_t*>(args.dh_transposed),
      {args.scale_grad, args.scale_w, args.scale_y, args.scale_dh, args.amax, args.saturated}};
  const RowOrder order{/*token=*/1, /*group=*/4, int(args.features), args.grad_tail};
  const DenseProduct product{args.tokens, args.features, args.in, args.grad, args.ld_grad, args.w, args.in};
  Gemm::launch(product, config, epilogue, stream, "sparse24.linear_relu2_gradient_fp8: launch", order);
}

}  // namespace sparse24::cuda
