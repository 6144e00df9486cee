// The producer's halves of CUTLASS's dense and sparse mainloops for tiles that belong to an expert
// (schedulers/expert_scheduler.cuh): rows of A begin anywhere, or at padded rows if it is sparse, and B is an expert's.
// Buffers, barriers and mma stay as they are. Rows is what copies B: mainloops/expert_rows.cuh where it is K-major, and
// mainloops/expert_columns.cuh where it is not.
#pragma once

#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>

#include "gemm/sm90/mainloops/tensor_map.cuh"

namespace sparse24::cuda {

// Base: the dense collective that CUTLASS builds for tiles of 128 rows, A K-major and clusters of two CTAs along M. A
// tile's rows of A beyond its expert belong to the next; their products are stored by nobody.
template <class Base, class Rows>
struct DenseExpertsMainloop : Base {
  using typename Base::MainloopPipeline;
  using typename Base::PipelineState;
  using typename Base::TensorStorage;
  using typename Base::TileShape;
  static constexpr int kTileM = cute::size<0>(TileShape{}), kTileK = cute::size<2>(TileShape{});
  static constexpr int kTileElements = cute::size<1>(TileShape{}) * kTileK;

  using Arguments = typename Base::Arguments;
  struct Params : Base::Params {
    cute::TmaDescriptor a_rows;
    typename Rows::Params w_params;
  };

  template <class ProblemShape>
  static Params to_underlying_arguments(ProblemShape const& shape, Arguments const& args, void* workspace) {
    const auto [m, n, k, experts] = shape;
    const MapDim dims[] = {{1, k, kTileK}, {k, m, kTileM}};
    return {Base::to_underlying_arguments(cute::make_shape(m, n, k, 1), args, workspace),
            map_rows(args.ptr_A, dims, "sparse24.experts_linear"),
            Rows::of(args.ptr_B, n, k, experts, "sparse24.experts_linear")};
  }

  CUTLASS_DEVICE static void prefetch_tma_descriptors(Params const& params) {
    cute::prefetch_tma_descriptor(&params.a_rows);
    Rows::prefetch(params.w_params);
  }

  template <class Inputs, class KTileIterator, class Place>
  CUTLASS_DEVICE void load(Params const& params, MainloopPipeline pipeline, PipelineState write, Inputs const&,
                           Place const& at, KTileIterator k_tile, int k_tiles, int, uint32_t rank_in_cluster,
                           TensorStorage& shared) {
    using namespace cute;
    if (!elect_one_sync()) return;
    constexpr auto kHint = static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_NORMAL);
    Rows::with_copies(params.w_params, at.n, at.expert, int(rank_in_cluster), at.shares_columns, [&](auto copy_b) {
      CUTLASS_PRAGMA_NO_UNROLL
      for (; k_tiles > 0; --k_tiles, ++k_tile, ++write) {
        pipeline.producer_acquire(write);
        auto* barrier = pipeline.producer_get_barrier(write);
        const int column = int(*k_tile) * kTileK;
        // What the other CTA may wait for comes first.
        copy_b(barrier, raw_pointer_cast(shared.smem_B.data()) + write.index() * kTileElements, column);
        SM90_TMA_LOAD_2D::copy(&params.a_rows, barrier, kHint,
                               raw_pointer_cast(shared.smem_A.data()) + write.index() * (kTileM * kTileK), column,
                               at.row);
      }
    });
  }
};

// Base: the sparse collective likewise. A and its metadata have the padded rows.
template <class Base, class Rows>
struct SparseExpertsMainloop : Base {
  using typename Base::MainloopPipeline;
  using typename Base::PipelineState;
  using typename Base::TensorStorage;
  using typename Base::TileShape;
  static constexpr int kTileM = cute::size<0>(TileShape{}), kTileK = cute::size<2>(TileShape{});
  static constexpr int kTileElements = cute::size<1>(TileShape{}) * kTileK;

  using Arguments = typename Base::Arguments;
  struct Params : Base::Params {
    typename Rows::Params w_params;
  };

  template <class ProblemShape>
  static Params to_underlying_arguments(ProblemShape const& shape, Arguments const& args, void* workspace) {
    const auto [m, n, k, experts] = shape;
    return {Base::to_underlying_arguments(cute::make_shape(m, n, k, 1), args, workspace),
            Rows::of(args.ptr_B, n, k, experts, "sparse24.experts_mm")};
  }

  // The coordinates of A, whose batches are not the experts of the problem.
  template <class ProblemShape>
  CUTLASS_DEVICE auto load_init(ProblemShape const& shape, Params const& params) const {
    const auto [m, n, k, experts] = shape;
    return Base::load_init(cute::make_shape(m, n, k, 1), params);
  }

  CUTLASS_DEVICE static void prefetch_tma_descriptors(Params const& params) {
    cute::prefetch_tma_descriptor(params.tma_load_a.get_tma_descriptor());
    cute::prefetch_tma_descriptor(params.tma_load_e.get_tma_descriptor());
    Rows::prefetch(params.w_params);
  }

  template <class TensorA, class TensorB, class TensorE, class KTileIterator, class Place>
  CUTLASS_DEVICE void load(Params const& params, MainloopPipeline pipeline, PipelineState write,
                           cute::tuple<TensorA, TensorB, TensorE> const& inputs, Place const& at, KTileIterator k_tile,
                           int k_tiles, int, uint32_t rank_in_cluster, TensorStorage& shared) {
    using namespace cute;
    if (!elect_one_sync()) return;
    const Tensor a = make_tensor(make_smem_ptr(shared.smem_A.begin()), typename Base::SmemLayoutA{});
    const Tensor e = make_tensor(make_smem_ptr(shared.smem_E.begin()), typename Base::SmemLayoutE{});
    const int m = at.padded_row / kTileM;
    const auto copy_a = params.tma_load_a.get_slice(0);
    const auto copy_e = params.tma_load_e.get_slice(0);
    const Tensor from_a = copy_a.partition_S(get<0>(inputs)(_, _, m, _, 0));  // (TMA, TMA_M, TMA_K, k)
    const Tensor from_e = copy_e.partition_S(get<2>(inputs)(_, _, m, _, 0));
    const Tensor to_a = copy_a.partition_D(a);  // (TMA, TMA_M, TMA_K, stage)
    const Tensor to_e = copy_e.partition_D(e);
    Rows::with_copies(params.w_params, at.n, at.expert, int(rank_in_cluster), at.shares_columns, [&](auto copy_b) {
      CUTLASS_PRAGMA_NO_UNROLL
      for (; k_tiles > 0; --k_tiles, ++k_tile, ++write) {
        pipeline.producer_acquire(write);
        auto* barrier = pipeline.producer_get_barrier(write);
        // What the other CTA may wait for comes first.
        copy_b(barrier, raw_pointer_cast(shared.smem_B.begin()) + write.index() * kTileElements, int(*k_tile) * kTileK);
        copy(params.tma_load_a.with(*barrier, 0), from_a(_, _, _, *k_tile), to_a(_, _, _, write.index()));
        copy(params.tma_load_e.with(*barrier, 0), from_e(_, _, _, *k_tile), to_e(_, _, _, write.index()));
      }
    });
  }
};

}  // namespace sparse24::cuda
