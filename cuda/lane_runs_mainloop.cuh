// The producer's halves of CUTLASS's mainloops, dense and sparse, with the rows of a K-major B in the order of
// lane_runs.cuh.
#pragma once

#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>

#include "lane_runs_copies.cuh"

namespace sparse24::cuda {

// Stock: the dense collective that CUTLASS builds for K-major operands and clusters of two CTAs. Two along N share the
// rows of x. Its buffers, barriers and products, and the copies of x, stay as they are.
template <class Stock, class Runs>
struct LaneRunsMainloop : Stock {
  using typename Stock::MainloopPipeline;
  using typename Stock::PipelineState;
  using typename Stock::TensorStorage;
  using Copies = LaneRunsCopies<Stock, Runs>;
  static constexpr int kTileK = cute::size<2>(typename Stock::TileShape{});
  static constexpr int kTileElements = cute::size<1>(typename Stock::TileShape{}) * kTileK;

  using Arguments = typename Stock::Arguments;
  struct Params : Stock::Params {
    typename Copies::Params of_w;
  };

  template <class ProblemShape>
  static Params to_underlying_arguments(ProblemShape const& shape, Arguments const& args, void* workspace) {
    const auto [m, n, k, l] = shape;
    return {Stock::to_underlying_arguments(shape, args, workspace),
            Copies::of(args.ptr_B, cute::get<0>(args.dB), n, k, true, "sparse24.linear")};
  }

  CUTLASS_DEVICE static void prefetch_tma_descriptors(Params const& params) {
    cute::prefetch_tma_descriptor(params.tma_load_a.get_tma_descriptor());
    Copies::prefetch(params.of_w);
  }

  template <class TensorA, class TensorB, class KTileIterator, class BlockCoord>
  CUTLASS_DEVICE void load(Params const& params, MainloopPipeline pipeline, PipelineState write,
                           cute::tuple<TensorA, TensorB> const& inputs, BlockCoord const& coord, KTileIterator k_tile,
                           int k_tiles, int, uint32_t rank_in_cluster, TensorStorage& shared) {
    using namespace cute;
    if (!elect_one_sync()) return;
    const Tensor a = make_tensor(make_smem_ptr(shared.smem_A.data()), typename Stock::SmemLayoutA{});
    const auto [m, n, _k, l] = coord;
    const auto copy_a = params.tma_load_a.get_slice(Copies::kShared ? 0 : int(rank_in_cluster));
    const Tensor from_a = copy_a.partition_S(get<0>(inputs)(_, _, m, _, l));  // (TMA, TMA_M, TMA_K, k)
    const Tensor to_a = copy_a.partition_D(a);                                // (TMA, TMA_M, TMA_K, stage)
    constexpr uint16_t kReceivers = Copies::kShared ? 0 : 3;
    CUTLASS_PRAGMA_NO_UNROLL
    for (; k_tiles > 0; --k_tiles, ++k_tile, ++write) {
      pipeline.producer_acquire(write);
      auto* barrier = pipeline.producer_get_barrier(write);
      copy(params.tma_load_a.with(*barrier, kReceivers), from_a(_, _, _, *k_tile), to_a(_, _, _, write.index()));
      Copies::load(params.of_w, barrier, raw_pointer_cast(shared.smem_B.data()) + write.index() * kTileElements, int(n),
                   int(*k_tile) * kTileK, int(rank_in_cluster));
    }
  }
};

// Stock: the sparse one, for clusters of two CTAs along M, which have rows of A of their own, with their metadata.
// Batches are parts of K.
template <class Stock, class Runs>
struct SparseLaneRunsMainloop : Stock {
  using typename Stock::MainloopPipeline;
  using typename Stock::PipelineState;
  using typename Stock::TensorStorage;
  using Copies = LaneRunsCopies<Stock, Runs>;
  static constexpr int kTileK = cute::size<2>(typename Stock::TileShape{});
  static constexpr int kTileElements = cute::size<1>(typename Stock::TileShape{}) * kTileK;
  static_assert(Copies::kShared, "two CTAs share the columns");

  struct Arguments : Stock::Arguments {
    bool in_runs;
  };
  struct Params : Stock::Params {
    typename Copies::Params of_b;
    int part;  // of K
  };

  template <class ProblemShape>
  static Params to_underlying_arguments(ProblemShape const& shape, Arguments const& args, void* workspace) {
    const auto [m, n, k, l] = shape;
    return {Stock::to_underlying_arguments(shape, args, workspace),
            Copies::of(args.ptr_B, cute::get<0>(args.dB), n, int64_t(k) * l, args.in_runs, "sparse24.mm"), int(k)};
  }

  CUTLASS_DEVICE static void prefetch_tma_descriptors(Params const& params) {
    cute::prefetch_tma_descriptor(params.tma_load_a.get_tma_descriptor());
    cute::prefetch_tma_descriptor(params.tma_load_e.get_tma_descriptor());
    Copies::prefetch(params.of_b);
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
    const auto copy_a = params.tma_load_a.get_slice(0);
    const auto copy_e = params.tma_load_e.get_slice(0);
    const Tensor from_a = copy_a.partition_S(get<0>(inputs)(_, _, m, _, l));  // (TMA, TMA_M, TMA_K, k)
    const Tensor from_e = copy_e.partition_S(get<2>(inputs)(_, _, m, _, l));
    const Tensor to_a = copy_a.partition_D(a);  // (TMA, TMA_M, TMA_K, stage)
    const Tensor to_e = copy_e.partition_D(e);
    const int first = int(l) * params.part;
    CUTLASS_PRAGMA_NO_UNROLL
    for (; k_tiles > 0; --k_tiles, ++k_tile, ++write) {
      pipeline.producer_acquire(write);
      auto* barrier = pipeline.producer_get_barrier(write);
      copy(params.tma_load_a.with(*barrier, 0), from_a(_, _, _, *k_tile), to_a(_, _, _, write.index()));
      copy(params.tma_load_e.with(*barrier, 0), from_e(_, _, _, *k_tile), to_e(_, _, _, write.index()));
      Copies::load(params.of_b, barrier, raw_pointer_cast(shared.smem_B.begin()) + write.index() * kTileElements,
                   int(n), first + int(*k_tile) * kTileK, int(rank_in_cluster));
    }
  }
};

}  // namespace sparse24::cuda
