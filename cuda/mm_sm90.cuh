// The sparse GEMM for Hopper: CUTLASS's warp-specialised wgmma.sp mainloop with the epilogue of epilogue_store.cuh.
//
// A [M, K] is 2:4 and comes compressed with its metadata E, B [K, N] is dense; fp8 accumulates fast (no promotion).
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/device_kernel.h>
#include <cutlass/gemm/kernel/tile_scheduler_params.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/detail.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/dispatch_policy.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "epilogue_store.cuh"
#include "launch.cuh"
#include "mm_launchers.h"
#include "sparse24/device.h"

namespace sparse24::cuda {

template <DType>
struct MmElement;
template <>
struct MmElement<DType::kBFloat16> {
  using type = cutlass::bfloat16_t;
};
template <>
struct MmElement<DType::kFloat16> {
  using type = cutlass::half_t;
};
template <>
struct MmElement<DType::kFloat8E4M3> {
  using type = cutlass::float_e4m3_t;
};

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
  using Element = typename MmElement<kDType>::type;
  using Shape = MmTileShape<kTile>;
  static constexpr bool kFp8 = kDType == DType::kFloat8E4M3;
  static constexpr int kTileK = int(meta_atom_k(kDType));
  using TileShape = cute::Shape<cute::Int<Shape::kM>, cute::Int<Shape::kN>, cute::Int<kTileK>>;
  using ClusterShape = cute::Shape<cute::Int<Shape::kClusterM>, cute::_1, cute::_1>;

  using LayoutA = std::conditional_t<kADim == Dim::kFeatures, cutlass::layout::RowMajor, cutlass::layout::ColumnMajor>;
  using LayoutB =
      std::conditional_t<kBMajor == Major::kColumn, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>;
  static constexpr int kAlignmentA = 2 * 16 / sizeof(Element);  // logical: 16 bytes of compressed values
  static constexpr int kAlignmentB = 16 / sizeof(Element);

  // Two warpgroups share a tile of 128 rows and more; tiles of 64 rows alternate between them.
  using Schedule16 = std::conditional_t<(Shape::kM >= 128), cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                                        cutlass::gemm::KernelTmaWarpSpecializedPingpong>;
  using Schedule8 =
      std::conditional_t<(Shape::kM >= 128), cutlass::gemm::KernelTmaWarpSpecializedCooperativeFP8FastAccum,
                         cutlass::gemm::KernelTmaWarpSpecializedPingpongFP8FastAccum>;
  using Schedule = std::conditional_t<kFp8, Schedule8, Schedule16>;

  using Epilogue = cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<StoreEpilogue>;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Element, LayoutA, kAlignmentA, Element, LayoutB,
      kAlignmentB, float, TileShape, ClusterShape,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      Schedule>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue,
                                                      cutlass::gemm::PersistentScheduler>;
  using SparseConfig = typename Mainloop::SparseConfig;
  using Raster = typename cutlass::gemm::kernel::detail::RasterOrderOptions;

  static typename Kernel::Arguments arguments(const MmArgs& args, const MmConfig& config) {
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

    typename Kernel::Arguments out{cutlass::gemm::GemmUniversalMode::kGemm,
                                   {m, n, k, 1},
                                   {reinterpret_cast<typename Mainloop::ElementA const*>(args.values), layout_a,
                                    reinterpret_cast<Element const*>(args.b), stride_b,
                                    reinterpret_cast<typename Mainloop::ElementE const*>(args.meta), layout_e},
                                   store};
    out.hw_info.device_id = current_device();
    out.hw_info.sm_count = device_info().sm_count;
    out.scheduler.max_swizzle_size = config.swizzle;
    out.scheduler.raster_order = config.raster_along_m ? Raster::AlongM : Raster::AlongN;
    return out;
  }

  static void launch(const MmArgs& args, const MmConfig& config, cudaStream_t stream) {
    constexpr auto kernel = cutlass::device_kernel<Kernel>;
    constexpr int kSharedBytes = Kernel::SharedStorageSize;
    allow_shared_memory<kernel>(kSharedBytes);

    const auto params = Kernel::to_underlying_arguments(arguments(args, config), nullptr);
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {unsigned(Shape::kClusterM), 1, 1};
    cudaLaunchConfig_t launch{};
    launch.gridDim = Kernel::get_grid_shape(params);
    launch.blockDim = Kernel::get_block_shape();
    launch.dynamicSmemBytes = kSharedBytes;
    launch.stream = stream;
    launch.attrs = &cluster;
    launch.numAttrs = 1;
    check_cuda(cudaLaunchKernelEx(&launch, kernel, params), "sparse24.mm: launch");
  }
};

template <DType kDType, Dim kADim, Major kBMajor, MmTile kTile>
void launch_mm_sm90(const MmArgs& args, const MmConfig& config, cudaStream_t stream) {
  MmSm90<kDType, kADim, kBMajor, kTile>::launch(args, config, stream);
}

}  // namespace sparse24::cuda
