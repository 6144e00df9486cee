// The producer's half of CUTLASS's dense mainloop with the rows of w in the order of epilogues/permuted_n.cuh, and the
// rows of B of the sparse one.
#pragma once

#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>

#include "gemm/sm90/mainloops/permuted_n_copies.cuh"

namespace sparse24::cuda {

// Base is the dense collective that CUTLASS builds for K-major operands and clusters of two CTAs. Two along N share the
// rows of x. Its buffers, barriers and mma, and the copies of x, stay as they are.
template <class Base, class Permutation>
struct PermutedNMainloop : Base {
  using typename Base::MainloopPipeline;
  using typename Base::PipelineState;
  using typename Base::TensorStorage;
  using Copies = PermutedNCopies<Base, Permutation>;
  static constexpr int kTileK = cute::size<2>(typename Base::TileShape{});
  static constexpr int kTileElements = cute::size<1>(typename Base::TileShape{}) * kTileK;

  using Arguments = typename Base::Arguments;
  struct Params : Base::Params {
    typename Copies::Params w_params;
  };

  template <class ProblemShape>
  static Params to_underlying_arguments(ProblemShape const& shape, Arguments const& args, void* workspace) {
    const auto [m, n, k, l] = shape;
    return {Base::to_underlying_arguments(shape, args, workspace),
            Copies::of(args.ptr_B, cute::get<0>(args.dB), n, k, true, "sparse24.linear")};
  }

  CUTLASS_DEVICE static void prefetch_tma_descriptors(Params const& params) {
    cute::prefetch_tma_descriptor(params.tma_load_a.get_tma_descriptor());
    Copies::prefetch(params.w_params);
  }

  // kRows are the rows of B that a tile has, or a part of one, which coord then counts.
  template <int kRows = cute::size<1>(typename Base::TileShape{}), class TensorA, class TensorB, class KTileIterator,
            class BlockCoord>
  CUTLASS_DEVICE void load(Params const& params, MainloopPipeline pipeline, PipelineState write,
                           cute::tuple<TensorA, TensorB> const& inputs, BlockCoord const& coord, KTileIterator k_tile,
                           int k_tiles, int, uint32_t rank_in_cluster, TensorStorage& shared) {
    using namespace cute;
    if (!elect_one_sync()) return;
    const Tensor a = make_tensor(make_smem_ptr(shared.smem_A.data()), typename Base::SmemLayoutA{});
    const auto [m, n, _k, l] = coord;
    const auto copy_a = params.tma_load_a.get_slice(Copies::kShared ? 0 : int(rank_in_cluster));
    const Tensor from_a = copy_a.partition_S(get<0>(inputs)(_, _, m, _, l));  // (TMA, TMA_M, TMA_K, k)
    const Tensor to_a = copy_a.partition_D(a);                                // (TMA, TMA_M, TMA_K, stage)
    constexpr uint16_t kReceivers = Copies::kShared ? 0 : 3;
    // What the other CTA waits for comes first.
    const auto copy_a_to = [&](auto* barrier, int k, int stage) {
      copy(params.tma_load_a.with(*barrier, kReceivers), from_a(_, _, _, k), to_a(_, _, _, stage));
    };
    CUTLASS_PRAGMA_NO_UNROLL
    for (; k_tiles > 0; --k_tiles, ++k_tile, ++write) {
      pipeline.producer_acquire(write);
      auto* barrier = pipeline.producer_get_barrier(write);
      if constexpr (!Copies::kShared) copy_a_to(barrier, *k_tile, write.index());
      Copies::template load<kRows>(params.w_params, barrier,
                                   raw_pointer_cast(shared.smem_B.data()) + write.index() * kTileElements, int(n),
                                   int(*k_tile) * kTileK, int(rank_in_cluster));
      if constexpr (Copies::kShared) copy_a_to(barrier, *k_tile, write.index());
    }
  }
};

// The rows of B for SparseRowsMainloop; batches are parts of K.
template <class Base, class Permutation>
class PermutedNRows {
  using Copies = PermutedNCopies<Base, Permutation>;
  static constexpr int kTileK = cute::size<2>(typename Base::TileShape{});
  static_assert(Copies::kShared, "two CTAs share the columns");

 public:
  struct Params {
    typename Copies::Params rows;
    int part;  // of K
  };

  template <class ProblemShape>
  static Params of(ProblemShape const& shape, typename Base::Arguments const& args, RowsOfB const& rows) {
    const auto [m, n, k, l] = shape;
    return {Copies::of(args.ptr_B, cute::get<0>(args.dB), n, int64_t(k) * l, rows.reordered, "sparse24.mm"), int(k)};
  }

  CUTLASS_DEVICE static void prefetch(Params const& params) { Copies::prefetch(params.rows); }

  template <class Barrier>
  CUTLASS_DEVICE static void load(Params const& params, Barrier* barrier, typename Base::ElementB* stage, int n, int l,
                                  int k_tile, int rank_in_cluster) {
    Copies::load(params.rows, barrier, stage, n, l * params.part + k_tile * kTileK, rank_in_cluster);
  }
};

}  // namespace sparse24::cuda
