// The dense GEMMs for Hopper, A [M, K] K-major, B [K, N] of either major, with an epilogue of ours: in pingpong, where
// two warpgroups work on a tile each, one's epilogue under the other's mma, or overlapped
// (kernels/overlapped.cuh).
#pragma once

#include "gemm/sm90/kernels/gemm.cuh"
#include "gemm/sm90/kernels/overlapped.cuh"
#include "gemm/sm90/kernels/persistent.cuh"
#include "gemm/sm90/schedulers/scheduler_of.cuh"
#include "sparse24/linear.h"

namespace sparse24::cuda {

// CUDA's type for a DType of 16 bits.
template <DType>
struct CudaType;
template <>
struct CudaType<DType::kBFloat16> {
  using type = __nv_bfloat16;
};
template <>
struct CudaType<DType::kFloat16> {
  using type = __half;
};

// A row of tiles.def, as the traits of a kernel.
template <GemmTile kTile>
struct DenseTile {
  static constexpr TileSpec kSpec = dense_tile(kTile);
  static constexpr int kM = kSpec.m, kN = kSpec.n, kClusterM = kSpec.cluster_m, kClusterN = kSpec.cluster_n;
  static constexpr Scheduler kScheduler = kSpec.scheduler();
  static constexpr bool kPingpong = kSpec.schedule == Schedule::kPingpong;
  static_assert(kPingpong || kSpec.schedule == Schedule::kOverlapped, "no cooperative kernel");
};

// The kernel, and as many stages of operands as fit beside the rest.
template <class Tile, class Epilogue, bool kPingpong = Tile::kPingpong>
struct DenseKernelOf {
  using Stages = GemmStages<Epilogue>;
  template <class Mainloop>
  using Kernel = PersistentGemm<Mainloop, Epilogue, SchedulerOf<Tile::kScheduler, Tile::kClusterM, Tile::kClusterN>>;
};
template <class Tile, class Epilogue>
struct DenseKernelOf<Tile, Epilogue, false> {
  using Stages = OverlappedStages<Epilogue>;
  template <class Mainloop>
  using Kernel = OverlappedGemm<Mainloop, DenseMma<Mainloop, Tile::kN>, Epilogue, SplitTiles<Mainloop, Epilogue>,
                                SchedulerOf<Tile::kScheduler, Tile::kClusterM, Tile::kClusterN, 4>>;
};

// What is multiplied; leading dimensions are multiples of 16 bytes.
struct DenseProduct {
  int64_t m, n, k;
  const void* a;
  int64_t lda;
  const void* b;
  int64_t ldb;
};

// Leaves the rows of A in their own order, with CUTLASS's loads.
template <class Base>
using BaseMainloop = Base;

// Epilogue is one in steps for the overlapped kernel, and for pingpong one of ours in an adapter that CUTLASS's kernel
// layer can host. Loads makes of a mainloop of CUTLASS's what is run, with `more` arguments than that has.
template <DType kDType, Major kBMajor, class Tile, class Epilogue, template <class> class Loads = BaseMainloop>
struct DenseSm90 {
  static constexpr bool kFp8 = kDType == DType::kFloat8E4M3;
  using Element = typename GemmElement<kDType>::type;
  using LayoutB =
      std::conditional_t<kBMajor == Major::kColumn, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>;
  using Of = DenseKernelOf<Tile, Epilogue>;
  static constexpr int kAlignment = 16 / sizeof(Element);
  using Base = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor, kAlignment, Element,
      LayoutB, kAlignment, float, cute::Shape<cute::Int<Tile::kM>, cute::Int<Tile::kN>, cute::Int<kFp8 ? 128 : 64>>,
      cute::Shape<cute::Int<Tile::kClusterM>, cute::Int<Tile::kClusterN>, cute::_1>, typename Of::Stages,
      GemmSchedule<kFp8, Tile::kPingpong>>::CollectiveOp;
  using Mainloop = Loads<Base>;
  using Kernel = typename Of::template Kernel<Mainloop>;

  template <class... More>
  static void launch(const DenseProduct& product, const GemmConfig& config, const typename Epilogue::Params& epilogue,
                     cudaStream_t stream, const char* what, const More&... more) {
    typename Mainloop::StrideA stride_a{};
    typename Mainloop::StrideB stride_b{};
    cute::get<0>(stride_a) = product.lda;
    cute::get<kBMajor == Major::kColumn ? 0 : 1>(stride_b) = product.ldb;
    typename Kernel::Arguments arguments{{int(product.m), int(product.n), int(product.k), 1}, {}, epilogue, config};
    const typename Base::Arguments operands{static_cast<Element const*>(product.a), stride_a,
                                            static_cast<Element const*>(product.b), stride_b};
    if constexpr (sizeof...(More) > 0) {
      arguments.mainloop = {operands, more...};
    } else {
      arguments.mainloop = operands;
    }
    launch_gemm<Kernel>(arguments, stream, what);
  }
};

}  // namespace sparse24::cuda
