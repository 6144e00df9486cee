// Parts of a 2:4 tile, of its columns, for the kernel of kernels/overlapped.cuh where it splits the tiles of the last
// wave: their copies, their mma, and the two with an epilogue as what that kernel asks for.
#pragma once

#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>

#include "gemm/sm90/mainloops/permuted_n_mainloop.cuh"
#include "gemm/sm90/mainloops/sparse_mma.cuh"
#include "gemm/sm90/mainloops/sparse_rows_mainloop.cuh"

namespace sparse24::cuda {

// A sparse mainloop of CUTLASS's for two CTAs along M, as a part of kColumns columns sees it: the first of B's rows in
// each stage, and an mma of so many columns.
template <class Mainloop, int kColumns>
struct PartOfColumns : Mainloop {
  static constexpr int kTileM = cute::size<0>(typename Mainloop::TileShape{});
  static constexpr int kTileK = cute::size<2>(typename Mainloop::TileShape{});
  using TileShape = cute::Shape<cute::Int<kTileM>, cute::Int<kColumns>, cute::Int<kTileK>>;
  using TiledMma =
      decltype(cute::make_tiled_mma(cute::GMMA::ss_op_selector_sparse<typename Mainloop::ElementAMmaRaw,
                                                                      typename Mainloop::ElementB, float, TileShape>(),
                                    cute::Layout<cute::Shape<cute::_2, cute::_1, cute::_1>>{}));
  // The swizzle is that of the whole stage; a tensor's layout is without it.
  using WholeB = typename Mainloop::SmemLayoutB;
  using RowsOfPart = decltype(cute::local_tile(
      cute::make_tensor(cute::make_smem_ptr(static_cast<typename Mainloop::ElementB*>(nullptr)), WholeB{}),
      cute::Shape<cute::Int<kColumns>, cute::Int<kTileK>>{}, cute::make_coord(cute::_0{}, cute::_0{})));
  using SmemLayoutB = cute::ComposedLayout<cute::remove_cvref_t<decltype(WholeB{}.layout_a())>,
                                           cute::remove_cvref_t<decltype(WholeB{}.offset())>,
                                           cute::remove_cvref_t<decltype(std::declval<RowsOfPart>().layout())>>;
};

template <class Mainloop, int kColumns>
struct SparsePartMma : SparseMma<PartOfColumns<Mainloop, kColumns>> {
  static constexpr int kMissing = cute::size<1>(typename Mainloop::TileShape{}) - kColumns;
  static constexpr uint32_t kBytes =  // of a K tile
      Mainloop::TmaTransactionBytes -
      kMissing * cute::size<2>(typename Mainloop::TileShape{}) * sizeof(typename Mainloop::ElementB);
};

// SparseRowsMainloop with the rows of B in their own order, which loads parts too: `load` for kRows rows of B, of which
// coord counts parts.
template <class Base, class Permutation>
struct SplitSparseMainloop : SparseRowsMainloop<Base, PermutedNRows<Base, Permutation>> {
  using Whole = SparseRowsMainloop<Base, PermutedNRows<Base, Permutation>>;
  using typename Whole::MainloopPipeline;
  using typename Whole::Params;
  using typename Whole::PipelineState;
  using typename Whole::TensorStorage;
  using Copies = PermutedNCopies<Base, Permutation>;
  static constexpr int kTileK = cute::size<2>(typename Base::TileShape{});

  template <int kRows = cute::size<1>(typename Base::TileShape{}), class TensorA, class TensorB, class TensorE,
            class KTileIterator, class BlockCoord>
  CUTLASS_DEVICE void load(Params const& params, MainloopPipeline pipeline, PipelineState write,
                           cute::tuple<TensorA, TensorB, TensorE> const& inputs, BlockCoord const& coord,
                           KTileIterator k_tile, int k_tiles, int thread, uint32_t rank_in_cluster,
                           TensorStorage& shared) {
    if constexpr (kRows == cute::size<1>(typename Base::TileShape{})) {
      Whole::load(params, pipeline, write, inputs, coord, k_tile, k_tiles, thread, rank_in_cluster, shared);
    } else {
      load_part<kRows>(params, pipeline, write, inputs, coord, k_tile, k_tiles, rank_in_cluster, shared);
    }
  }

 private:
  template <int kRows, class Inputs, class KTileIterator, class BlockCoord>
  CUTLASS_DEVICE static void load_part(Params const& params, MainloopPipeline& pipeline, PipelineState write,
                                       Inputs const& inputs, BlockCoord const& coord, KTileIterator k_tile, int k_tiles,
                                       uint32_t rank_in_cluster, TensorStorage& shared) {
    using namespace cute;
    if (!elect_one_sync()) return;
    const auto [m, n, _k, l] = coord;
    const auto copy_a = params.tma_load_a.get_slice(0);
    const auto copy_e = params.tma_load_e.get_slice(0);
    const Tensor from_a = copy_a.partition_S(get<0>(inputs)(_, _, m, _, l));  // (TMA, TMA_M, TMA_K, k)
    const Tensor from_e = copy_e.partition_S(get<2>(inputs)(_, _, m, _, l));
    const Tensor to_a = copy_a.partition_D(  // (TMA, TMA_M, TMA_K, stage)
        make_tensor(make_smem_ptr(shared.smem_A.begin()), typename Base::SmemLayoutA{}));
    const Tensor to_e =
        copy_e.partition_D(make_tensor(make_smem_ptr(shared.smem_E.begin()), typename Base::SmemLayoutE{}));
    CUTLASS_PRAGMA_NO_UNROLL
    for (; k_tiles > 0; --k_tiles, ++k_tile, ++write) {
      pipeline.producer_acquire(write);
      auto* barrier = pipeline.producer_get_barrier(write);
      Copies::template load<kRows>(params.b_params.rows, barrier,
                                   raw_pointer_cast(shared.smem_B.begin()) + write.index() * Whole::kStageElements,
                                   int(n), int(*k_tile) * kTileK, int(rank_in_cluster));
      copy(params.tma_load_a.with(*barrier, 0), from_a(_, _, _, *k_tile), to_a(_, _, _, write.index()));
      copy(params.tma_load_e.with(*barrier, 0), from_e(_, _, _, *k_tile), to_e(_, _, _, write.index()));
    }
  }
};

// The split of a kernel with a 2:4 A whose scheduler may split the tiles of the last wave (kernels/split_tiles.cuh).
template <class Mainloop, class WholeEpilogue>
struct SplitSparseTiles {
  static constexpr int kParts = 4, kColumns = cute::size<1>(typename Mainloop::TileShape{}) / kParts;
  using Mma = SparsePartMma<Mainloop, kColumns>;
  using Epilogue = typename WholeEpilogue::template WithColumns<kColumns>;
};

}  // namespace sparse24::cuda
