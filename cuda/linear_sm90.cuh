// The first GEMM for Hopper: h = x [M, K] @ w.T [K, N], both K-major, with an epilogue that activates.
#pragma once

#include "epilogue_compress.cuh"
#include "epilogue_relu2.cuh"
#include "gemm_sm90.cuh"
#include "linear_launchers.h"

namespace sparse24::cuda {

template <DType>
struct HiddenType;
template <>
struct HiddenType<DType::kBFloat16> {
  using type = __nv_bfloat16;
};
template <>
struct HiddenType<DType::kFloat16> {
  using type = __half;
};

// Tile and cluster; select_linear_config.cpp holds the same sizes for the host. Rows of 128 cover the padding of the
// metadata.
struct LinearTile {
  static constexpr int kM = 128, kN = 128, kClusterM = 2;
};

template <DType kDType, class Epilogue_>
struct LinearSm90 {
  static constexpr bool kFp8 = kDType == DType::kFloat8E4M3;
  using Element = typename GemmElement<kDType>::type;
  using Epilogue = TermsAdapter<Epilogue_>;
  static constexpr int kAlignment = 16 / sizeof(Element);
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor, kAlignment, Element,
      cutlass::layout::ColumnMajor, kAlignment, float,
      cute::Shape<cute::Int<LinearTile::kM>, cute::Int<LinearTile::kN>, cute::Int<kFp8 ? 128 : 64>>,
      cute::Shape<cute::Int<LinearTile::kClusterM>, cute::_1, cute::_1>, GemmStages<Epilogue>,
      GemmSchedule<kFp8, /*kPingpong=*/true>>::CollectiveOp;
  using Kernel = GemmKernel<Mainloop, Epilogue>;

  static void launch(const LinearArgs& args, const LinearConfig& config, const typename Epilogue_::Params& epilogue,
                     cudaStream_t stream, const char* what) {
    typename Mainloop::StrideA stride_x{};
    typename Mainloop::StrideB stride_w{};
    cute::get<0>(stride_x) = args.in;
    cute::get<0>(stride_w) = args.in;
    const typename Kernel::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {int(args.tokens), int(args.out), int(args.in), 1},
        {static_cast<Element const*>(args.x), stride_x, static_cast<Element const*>(args.w), stride_w},
        epilogue};
    launch_gemm<Kernel>(arguments, config.swizzle, config.raster_along_m, stream, what);
  }
};

template <DType kDType, DType kHidden, DType kY>
void launch_linear_relu2_sm90(const LinearRelu2Args& args, const LinearConfig& config, cudaStream_t stream) {
  using Epilogue =
      Relu2Epilogue<typename HiddenType<kHidden>::type, kY == DType::kFloat8E4M3, LinearTile::kM, LinearTile::kN>;
  LinearSm90<kDType, Epilogue>::launch(args.linear, config, {HiddenParams::of(args.linear), args.y}, stream,
                                       "sparse24.linear_relu2: launch");
}

template <DType kDType, DType kHidden, DType kY, DType kMeta>
void launch_linear_compress_sm90(const LinearCompressArgs& args, const LinearConfig& config, cudaStream_t stream) {
  using Epilogue = CompressEpilogue<typename HiddenType<kHidden>::type, kY == DType::kFloat8E4M3,
                                    kMeta == DType::kFloat8E4M3, LinearTile::kM, LinearTile::kN>;
  const Operand a = Operand::of(args.linear.tokens, args.linear.out, kMeta, Dim::kFeatures);
  LinearSm90<kDType, Epilogue>::launch(args.linear, config, {HiddenParams::of(args.linear), a, args.values, args.meta},
                                       stream, "sparse24.linear_compress: launch");
}

}  // namespace sparse24::cuda
