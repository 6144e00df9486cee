// The first GEMM for Hopper: h = x [M, K] @ w.T [K, N], both K-major, with an epilogue that activates, and the rows of
// w in its order.
#pragma once

#include "gemm/linear_launchers.h"
#include "gemm/sm90/epilogues/compress.cuh"
#include "gemm/sm90/epilogues/relu2.cuh"
#include "gemm/sm90/mainloops/permuted_n_mainloop.cuh"
#include "gemm/sm90/ops/dense.cuh"

namespace sparse24::cuda {

template <class Permutation>
struct PermutedLoads {
  template <class Base>
  using Mainloop = PermutedNMainloop<Base, Permutation>;
};

// Epilogue: in steps.
template <DType kDType, class Tile, class Epilogue>
void launch_linear_sm90(const LinearArgs& args, const GemmConfig& config, const typename Epilogue::Params& epilogue,
                        cudaStream_t stream, const char* what) {
  static_assert(Tile::kPingpong || Epilogue::kSteps == Tile::kSpec.min_k_tiles());
  const DenseProduct product{args.tokens, args.out, args.in, args.x, args.in, args.w, args.in};
  using Hosted = std::conditional_t<Tile::kPingpong, OperandsAdapter<AtOnce<Epilogue>>, Epilogue>;
  DenseSm90<kDType, Major::kColumn, Tile, Hosted,
            PermutedLoads<typename Epilogue::Permutation>::template Mainloop>::launch(product, config, epilogue, stream,
                                                                                      what);
}

template <DType kDType, DType kPreActivation, DType kY, GemmTile kTile>
void launch_linear_relu2_sm90(const LinearRelu2Args& args, const GemmConfig& config, cudaStream_t stream) {
  using Tile = DenseTile<kTile>;
  using Epilogue = Relu2Epilogue<typename CudaType<kPreActivation>::type, kY == DType::kFloat8E4M3, Tile::kM, Tile::kN>;
  launch_linear_sm90<kDType, Tile, Epilogue>(args.linear, config, {LinearParams::of(args.linear), args.y}, stream,
                                             "sparse24.linear_relu2: launch");
}

template <DType kDType, DType kPreActivation, DType kY, DType kMeta, GemmTile kTile>
void launch_linear_compress_sm90(const LinearCompressArgs& args, const GemmConfig& config, cudaStream_t stream) {
  using Tile = DenseTile<kTile>;
  using Epilogue = CompressEpilogue<typename CudaType<kPreActivation>::type, kY == DType::kFloat8E4M3,
                                    kMeta == DType::kFloat8E4M3, Tile::kM, Tile::kN>;
  const Operand a = Operand::of(args.linear.tokens, args.linear.out, kMeta, Dim::kFeatures);
  launch_linear_sm90<kDType, Tile, Epilogue>(args.linear, config,
                                             {LinearParams::of(args.linear), a, args.values, args.meta}, stream,
                                             "sparse24.linear_compress: launch");
}

}  // namespace sparse24::cuda
