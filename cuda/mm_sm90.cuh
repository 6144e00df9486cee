// The sparse GEMM for Hopper: CUTLASS's warp-specialised wgmma.sp mainloop with the epilogue of epilogue_store.cuh.
//
// A [M, K] is 2:4 and comes compressed with its metadata E, B [K, N] is dense; fp8 accumulates fast (no promotion).
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/device_kernel.h>
#include <cutlass/gemm/kernel/tile_scheduler_params.h>

#include "epilogue_store.cuh"
#include "gemm_sm90.cuh"
#include "mm_launchers.h"

namespace sparse24::cuda {

// Tile, cluster and schedule; select_config.cpp holds the same sizes for the host.
template <MmTile>
struct MmTileShape;
template <>
struct MmTileShape<MmTile::k128x256> {
  static constexpr int kM = 128, kN = 256, kClusterM = 2;
};
template <>
struct MmTileShape<MmTile::k256x192> {
  static constexpr int kM = 256, kN = 192, kClusterM = 2;
};
template <>
struct MmTileShape<MmTile::k128x128> {
  static constexpr int kM = 128, kN = 128, kClusterM = 1;
};
template <>
struct MmTileShape<MmTile::k64x128> {
  static constexpr int kM = 64, kN = 128, kClusterM = 1;
};

template <DType kDType, Dim kADim, Major kBMajor, MmTile kTile>
struct MmSm90 {
  using Shape = MmTileShape<kTile>;
  using Element = typename GemmElement<kDType>::type;
  using TileShape = cute::Shape<cute::Int<Shape::kM>, cute::Int<Shape::kN>, cute::Int<int(meta_atom_k(kDType))>>;
  using ClusterShape = cute::Shape<cute::Int<Shape::kClusterM>, cute::_1, cute::_1>;

  using LayoutA = std::conditional_t<kADim == Dim::kFeatures, cutlass::layout::RowMajor, cutlass::layout::ColumnMajor>;
  using LayoutB =
      std::conditional_t<kBMajor == Major::kColumn, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>;
  static constexpr int kAlignmentA = 2 * 16 / sizeof(Element);  // logical: 16 bytes of compressed values
  static constexpr int kAlignmentB = 16 / sizeof(Element);

  using Epilogue = GemmEpilogue<StoreEpilogue>;
  // Tiles of 64 rows are too small to share.
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Element, LayoutA, kAlignmentA, Element, LayoutB,
      kAlignmentB, float, TileShape, ClusterShape, GemmStages<Epilogue>,
      GemmSchedule<kDType == DType::kFloat8E4M3, /*kPingpong=*/(Shape::kM < 128)>>::CollectiveOp;
  using Kernel = GemmKernel<Mainloop, Epilogue>;
  using SparseConfig = typename Mainloop::SparseConfig;

  static typename Kernel::Arguments arguments(const MmArgs& args) {
    const int m = int(args.a.m), n = int(args.n), k = int(args.a.k);
    // A and E are described by their padded sizes, B by its own: no load leaves a buffer.
    const auto layout_a = SparseConfig::fill_layoutA(cute::make_shape(m, n, int(args.a.k_values), 1));
    const auto layout_e = SparseConfig::fill_layoutE(cute::make_shape(int(args.a.m_meta), n, int(args.a.k_meta), 1));

    typename Mainloop::StrideB stride_b{};
    cute::get<kBMajor == Major::kColumn ? 0 : 1>(stride_b) = args.ldb;

    StoreParams store{};
    store.d = args.d;
    store.d_dtype = args.d_dtype;
    store.transposed = args.d_major == Major::kColumn;
    store.ldd = store.transposed ? args.a.m : args.n;
    store.vectorised = store.ldd % 8 == 0 && reinterpret_cast<uintptr_t>(args.d) % 16 == 0;
    store.scale_a = args.scale_a;
    store.scale_b = args.scale_b;
    store.scale_a_stride = args.scale_a_per_row;
    store.scale_b_stride = args.scale_b_per_column;
    store.bias = args.bias;
    store.bias_dtype = args.bias_dtype;

    return {cutlass::gemm::GemmUniversalMode::kGemm,
            {m, n, k, 1},
            {reinterpret_cast<typename Mainloop::ElementA const*>(args.values), layout_a,
             reinterpret_cast<Element const*>(args.b), stride_b,
             reinterpret_cast<typename Mainloop::ElementE const*>(args.meta), layout_e},
            store};
  }

  static void launch(const MmArgs& args, const MmConfig& config, cudaStream_t stream) {
    launch_gemm<Kernel>(arguments(args), config.swizzle, config.raster_along_m, stream, "sparse24.mm: launch");
  }
};

template <DType kDType, Dim kADim, Major kBMajor, MmTile kTile>
void launch_mm_sm90(const MmArgs& args, const MmConfig& config, cudaStream_t stream) {
  MmSm90<kDType, kADim, kBMajor, kTile>::launch(args, config, stream);
}

}  // namespace sparse24::cuda
