// The producer's half of CUTLASS's sparse mainloop for 16 bits, with the rows of B as they are or interleaved: row
// 4 g + i of the product is row i Q + g of B, Q a quarter of all rows. A tensor map of three dimensions reads them
// where they lie, so that weight gradients take x and the gradient of y in the order of the tokens.
//
//     dimension      columns of B   i                       g
//     interleaved    N, 64          4, Q rows apart, 4      Q, one row apart, 8    (size, and of one copy)
//     as they are    N, 64          K, one row apart, 32    1, 1
#pragma once

#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>

#include "tensor_map.cuh"

namespace sparse24::cuda {

// Stock: the collective that CUTLASS builds for MN-major B and clusters of two CTAs along M, which load 32 of the 64
// rows of a K tile each, for both. Its buffers, barriers and products stay as they are.
template <class Stock>
struct InterleavedRowsMainloop : Stock {
  using typename Stock::MainloopPipeline;
  using typename Stock::PipelineState;
  using typename Stock::TensorStorage;
  using typename Stock::TileShape;
  static constexpr int kTileN = cute::size<1>(TileShape{}), kTileK = cute::size<2>(TileShape{});
  static constexpr int kColumns = 64;  // of one copy: rows of 128 bytes
  static_assert(sizeof(typename Stock::ElementB) == 2 && kTileN % kColumns == 0 && kTileK == 64, "blocks of 64 x 64");
  static_assert(cute::size<0>(typename Stock::DispatchPolicy::ClusterShape{}) == 2 &&
                    cute::size<1>(typename Stock::DispatchPolicy::ClusterShape{}) == 1,
                "two CTAs share the columns");

  struct Arguments : Stock::Arguments {
    bool interleaved;
  };
  struct Params : Stock::Params {
    cute::TmaDescriptor rows;
    bool interleaved;
  };

  template <class ProblemShape>
  static Params to_underlying_arguments(ProblemShape const& shape, Arguments const& args, void* workspace) {
    const auto [m, n, k, l] = shape;
    const int64_t ld = cute::get<1>(args.dB), quarter = k / 4;
    const MapDim interleaved[] = {{1, n, kColumns}, {quarter * ld, 4, 4}, {ld, quarter, kTileK / 8}};
    const MapDim as_they_are[] = {{1, n, kColumns}, {ld, k, kTileK / 2}, {ld, 1, 1}};
    return {Stock::to_underlying_arguments(shape, args, workspace),
            map_rows(args.ptr_B, args.interleaved ? interleaved : as_they_are, "sparse24.mm"), args.interleaved};
  }

  CUTLASS_DEVICE static void prefetch_tma_descriptors(Params const& params) {
    cute::prefetch_tma_descriptor(params.tma_load_a.get_tma_descriptor());
    cute::prefetch_tma_descriptor(params.tma_load_e.get_tma_descriptor());
    cute::prefetch_tma_descriptor(&params.rows);
  }

  template <class TensorA, class TensorB, class TensorE, class KTileIterator, class BlockCoord>
  CUTLASS_DEVICE void load(Params const& params, MainloopPipeline pipeline, PipelineState write,
                           cute::tuple<TensorA, TensorB, TensorE> const& inputs, BlockCoord const& coord,
                           KTileIterator k_tile, int k_tiles, int, uint32_t rank_in_cluster, TensorStorage& shared) {
    using namespace cute;
    if (!elect_one_sync()) return;
    const Tensor a = make_tensor(make_smem_ptr(shared.smem_A.begin()), typename Stock::SmemLayoutA{});
    const Tensor e = make_tensor(make_smem_ptr(shared.smem_E.begin()), typename Stock::SmemLayoutE{});
    const auto [m, n, _k, l] = coord;
    // Each CTA has its own rows of A, all of them.
    const auto copy_a = params.tma_load_a.get_slice(0);
    const auto copy_e = params.tma_load_e.get_slice(0);
    const Tensor from_a = copy_a.partition_S(get<0>(inputs)(_, _, m, _, l));  // (TMA, TMA_M, TMA_K, k)
    const Tensor from_e = copy_e.partition_S(get<2>(inputs)(_, _, m, _, l));
    const Tensor to_a = copy_a.partition_D(a);  // (TMA, TMA_M, TMA_K, stage)
    const Tensor to_e = copy_e.partition_D(e);
    constexpr uint16_t kBoth = 3;
    constexpr auto kHint = static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_NORMAL);
    // Blocks of 64 columns, in each 64 rows of 128 bytes.
    auto* half_b = raw_pointer_cast(shared.smem_B.begin()) + rank_in_cluster * (kTileK / 2 * kColumns);
    CUTLASS_PRAGMA_NO_UNROLL
    for (; k_tiles > 0; --k_tiles, ++k_tile, ++write) {
      pipeline.producer_acquire(write);
      auto* barrier = pipeline.producer_get_barrier(write);
      const int stage = write.index(), row = int(*k_tile) * kTileK + int(rank_in_cluster) * (kTileK / 2);
      copy(params.tma_load_a.with(*barrier, 0), from_a(_, _, _, *k_tile), to_a(_, _, _, stage));
      copy(params.tma_load_e.with(*barrier, 0), from_e(_, _, _, *k_tile), to_e(_, _, _, stage));
      CUTLASS_PRAGMA_UNROLL
      for (int c = 0; c < kTileN; c += kColumns) {
        SM90_TMA_LOAD_MULTICAST_3D::copy(&params.rows, barrier, kBoth, kHint, half_b + (stage * kTileN + c) * kTileK,
                                         int(n) * kTileN + c, params.interleaved ? 0 : row,
                                         params.interleaved ? row / 4 : 0);
      }
    }
  }
};

}  // namespace sparse24::cuda
