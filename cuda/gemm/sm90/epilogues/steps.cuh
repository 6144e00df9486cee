// Epilogues in steps: begin() takes a tile from the accumulators as 16-bit numbers at once, and visits finish it a
// little at a time.
//
// The kernel of kernels/overlapped.cuh visits a tile under the next tile's mma. It asks of an epilogue, per consumer
// thread, for the 64 rows x Operands::kN columns of a warpgroup:
//
//     Params, Operands              what the kernel is given; what a tile needs, in shared memory
//     Permutation                   the order of its features (epilogues/permuted_n.cuh)
//     column_of(params, column)     the feature that a column of the tile is, by that order
//     fetch(params, lane, m, n, operands)
//                                   lets a lane of the warp that fetches bring its share of the operands of a tile
//     Epilogue(params)              has no tile yet: visits store nothing
//     begin(m, n, fragment, scales) takes the tile whose origin is m, n. scales (epilogues/scale_accumulators.cuh) may
//                                   be those of a wider tile at the same place
//     WithColumns<n>                where tiles are split: the same epilogue for parts of n columns, whose features
//                                   are in the same order
//     is_general()                  whether a tile's visits are in the general form, the same for the lanes of a warp
//     visit<step, general>()        finishes a step; all steps 0 .. kSteps - 1 follow each other
//
// The fragment is the one that epilogues/base.cuh draws.
#pragma once

#include "gemm/sm90/epilogues/base.cuh"
#include "gemm/sm90/epilogues/operands.cuh"
#include "gemm/sm90/epilogues/scale_accumulators.cuh"

namespace sparse24::cuda {

template <int kStep, class Epilogue>
CUTLASS_DEVICE void visit_step(Epilogue& epilogue) {
  if (epilogue.is_general()) {
    epilogue.template visit<kStep, true>();
  } else {
    epilogue.template visit<kStep, false>();
  }
}

template <bool kGeneral, int kStep, class Epilogue>
CUTLASS_DEVICE void visit_from(Epilogue& epilogue) {
  if constexpr (kStep < Epilogue::kSteps) {
    epilogue.template visit<kStep, kGeneral>();
    visit_from<kGeneral, kStep + 1>(epilogue);
  }
}

// Visits all steps, with one decision for all of them: between branches the compiler could not interleave them.
template <class Epilogue>
CUTLASS_DEVICE void visit_all(Epilogue& epilogue) {
  if (epilogue.is_general()) {
    visit_from<true, 0>(epilogue);
  } else {
    visit_from<false, 0>(epilogue);
  }
}

// What a tile is multiplied with that has none before it.
struct NoSteps {
  static constexpr int kSteps = 1;
  CUTLASS_DEVICE bool is_general() const { return false; }
  template <int kStep, bool kGeneral>
  CUTLASS_DEVICE void visit() {}
};

// Makes an epilogue in steps one for CUTLASS's kernels (inside of an OperandsAdapter), which store a tile before they
// go on to the next.
template <class Steps>
class AtOnce : public EpilogueBase<typename Steps::Params, OperandStages<typename Steps::Operands>> {
  using Base = EpilogueBase<typename Steps::Params, OperandStages<typename Steps::Operands>>;
  using Base::p_;

 public:
  using Base::Base;
  using Operands = typename Steps::Operands;
  CUTLASS_HOST_DEVICE static int column_of(typename Steps::Params const& p, int column) {
    return Steps::column_of(p, column);
  }

  template <class Problem, class BlockShape, class BlockCoord>
  CUTLASS_DEVICE void fetch(int lane, Problem const&, BlockShape const&, BlockCoord const& block_coord,
                            Operands& operands) const {
    Steps::fetch(p_, lane, cute::get<0>(block_coord) * Operands::kM, cute::get<1>(block_coord) * Operands::kN,
                 operands);
  }

  template <class Problem, class BlockShape, class BlockCoord, class Engine, class Layout, class TiledMma>
  CUTLASS_DEVICE void operator()(Problem const&, BlockShape const& block_shape, BlockCoord const& block_coord,
                                 cute::Tensor<Engine, Layout> const& acc, TiledMma tiled_mma, int thread_idx,
                                 Operands const& operands) const {
    using namespace cute;
    using Tile = Shape<Int<Operands::kM>, Int<Operands::kN>>;
    static_assert(is_same_v<decltype(take<0, 2>(block_shape)), Tile>, "operands of this tile");
    static_assert(decltype(size<2>(acc))::value == 1, "one MMA spans the columns");
    const auto coords = tiled_mma.get_slice(thread_idx).partition_C(make_identity_tensor(take<0, 2>(block_shape)));
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size<1>(acc); ++i) {
      Steps epilogue(p_);
      AccumulatorScales<Operands> scales(operands, get<0>(coords(make_coord(_0{}, _0{}, _0{}), i, _0{})));
      epilogue.begin(get<0>(block_coord) * Operands::kM, get<1>(block_coord) * Operands::kN, acc(_, i, _0{}), scales);
      visit_all(epilogue);
    }
  }
};

}  // namespace sparse24::cuda
