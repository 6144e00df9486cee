// The producer's half of CUTLASS's sparse mainloop, with copies of B that CuTe does not make.
#pragma once

#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>

#include "gemm/sm90/mainloops/tensor_map.cuh"

namespace sparse24::cuda {

// Base is the collective that CUTLASS builds for clusters of two CTAs along M, which have rows of A of their own, with
// their metadata, and share the columns of B. Its buffers, barriers and mma stay as they are. Rows has:
//
//     Params                                              what the kernel is given of B
//     of(problem, arguments, rows)                        these, for RowsOfB
//     prefetch(params)                                    the tensor maps in them
//     load(params, barrier, stage, n, l, k_tile, rank)    one CTA's share of a K tile, to a stage's buffer
template <class Base, class Rows>
struct SparseRowsMainloop : Base {
  using typename Base::MainloopPipeline;
  using typename Base::PipelineState;
  using typename Base::TensorStorage;
  using typename Base::TileShape;
  static constexpr int kStageElements = cute::size<1>(TileShape{}) * cute::size<2>(TileShape{});
  static_assert(cute::size<0>(typename Base::DispatchPolicy::ClusterShape{}) == 2 &&
                    cute::size<1>(typename Base::DispatchPolicy::ClusterShape{}) == 1,
                "two CTAs share the columns");

  struct Arguments : Base::Arguments {
    RowsOfB rows;
  };
  struct Params : Base::Params {
    typename Rows::Params b_params;
  };

  template <class ProblemShape>
  static Params to_underlying_arguments(ProblemShape const& shape, Arguments const& args, void* workspace) {
    return {Base::to_underlying_arguments(shape, args, workspace), Rows::of(shape, args, args.rows)};
  }

  CUTLASS_DEVICE static void prefetch_tma_descriptors(Params const& params) {
    cute::prefetch_tma_descriptor(params.tma_load_a.get_tma_descriptor());
    cute::prefetch_tma_descriptor(params.tma_load_e.get_tma_descriptor());
    Rows::prefetch(params.b_params);
  }

  template <class TensorA, class TensorB, class TensorE, class KTileIterator, class BlockCoord>
  CUTLASS_DEVICE void load(Params const& params, MainloopPipeline pipeline, PipelineState write,
                           cute::tuple<TensorA, TensorB, TensorE> const& inputs, BlockCoord const& coord,
                           KTileIterator k_tile, int k_tiles, int, uint32_t rank_in_cluster, TensorStorage& shared) {
    using namespace cute;
    if (!elect_one_sync()) return;
    const Tensor a = make_tensor(make_smem_ptr(shared.smem_A.begin()), typename Base::SmemLayoutA{});
    const Tensor e = make_tensor(make_smem_ptr(shared.smem_E.begin()), typename Base::SmemLayoutE{});
    const auto [m, n, _k, l] = coord;
    const auto copy_a = params.tma_load_a.get_slice(0);
    const auto copy_e = params.tma_load_e.get_slice(0);
    const Tensor from_a = copy_a.partition_S(get<0>(inputs)(_, _, m, _, l));  // (TMA, TMA_M, TMA_K, k)
    const Tensor from_e = copy_e.partition_S(get<2>(inputs)(_, _, m, _, l));
    const Tensor to_a = copy_a.partition_D(a);  // (TMA, TMA_M, TMA_K, stage)
    const Tensor to_e = copy_e.partition_D(e);
    CUTLASS_PRAGMA_NO_UNROLL
    for (; k_tiles > 0; --k_tiles, ++k_tile, ++write) {
      pipeline.producer_acquire(write);
      auto* barrier = pipeline.producer_get_barrier(write);
      // B first: the other CTA waits for its half.
      Rows::load(params.b_params, barrier, raw_pointer_cast(shared.smem_B.begin()) + write.index() * kStageElements,
                 int(n), int(l), int(*k_tile), int(rank_in_cluster));
      copy(params.tma_load_a.with(*barrier, 0), from_a(_, _, _, *k_tile), to_a(_, _, _, write.index()));
      copy(params.tma_load_e.with(*barrier, 0), from_e(_, _, _, *k_tile), to_e(_, _, _, write.index()));
    }
  }
};

}  // namespace sparse24::cuda
