// The producer's half of CUTLASS's dense mainloop, with the rows of A in the order that epilogues/gradient.cuh wants.
//
// Row 64 h + 16 w + 8 e + g of a tile of 128 is token 2 h + e of group 8 w + g of the tile. A tensor map of five
// dimensions says where the token lies: tokens of a group are neighbours, or a quarter of all tokens apart.
//
//     dimension      columns of A   g    e    w            h
//     size           K              8    2    tokens / 32  2
//     of one copy    128 bytes      8    2    4            2     (128 bytes x 128 rows)
//
// Where tokens are no multiple of 32 that map covers whole tiles, and another one the copy of the last rows.
#pragma once

#include <cutlass/cutlass.h>

#include <climits>
#include <cute/tensor.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>

#include "gemm/sm90/mainloops/tensor_map.cuh"
#include "sparse24/linear_gradient.h"

namespace sparse24::cuda {

// Rows of A between the tokens of a group and between groups. The columns of B: the tiles may cover more. And
// LinearGradientArgs::grad_tail, or null where the number of rows is a multiple of 32.
struct RowOrder {
  int64_t token, group;
  int columns;
  const void* tail;
};

// Base: the collective that CUTLASS builds for tiles of 128 rows and clusters of two CTAs along M, each of which has
// rows of its own. Its buffers, barriers and products, and the copies of B, stay as they are.
template <class Base>
struct GroupedRowsMainloop : Base {
  using typename Base::DispatchPolicy;
  using typename Base::MainloopPipeline;
  using typename Base::PipelineState;
  using typename Base::TensorStorage;
  using typename Base::TileShape;
  static constexpr int kColumns = cute::size<2>(TileShape{});
  static_assert(cute::size<0>(TileShape{}) == kGradTailTile && kColumns * sizeof(typename Base::ElementA) == 128,
                "a tile of 128 rows of 128 bytes");
  static_assert(cute::size<0>(typename DispatchPolicy::ClusterShape{}) == 2 &&
                    cute::size<1>(typename DispatchPolicy::ClusterShape{}) == 1,
                "two CTAs share the columns");

  struct Arguments : Base::Arguments {
    RowOrder order;
  };
  struct Params : Base::Params {
    cute::TmaDescriptor rows, tail;
    int tail_tile;  // the first that `tail` has the rows of
  };

  template <class ProblemShape>
  static Params to_underlying_arguments(ProblemShape const& shape, Arguments const& args, void* workspace) {
    const auto [m, n, k, l] = shape;
    const int64_t ld = cute::get<0>(args.dA), columns = k;
    using Element = typename Base::ElementA;
    const auto map = [&](const Element* start, int64_t rows, int64_t token, int64_t group) {
      const MapDim dims[] = {{1, columns, kColumns},
                             {group * ld, 8, 8},
                             {token * ld, 2, 2},
                             {8 * group * ld, cute::ceil_div(rows, kGradTokenMultiple), 4},
                             {2 * token * ld, 2, 2}};
      return map_rows(start, dims, "sparse24.linear_gradient");
    };
    const auto* tail = static_cast<const Element*>(args.order.tail);
    // A map has rows, if only some that nothing reads.
    const int64_t first = first_of_tail(m, kGradTailTile);
    const int64_t whole = tail ? cute::max(first, kGradTokenMultiple) : int64_t{m};
    const auto rows = map(args.ptr_A, whole, args.order.token, args.order.group);
    return {Base::to_underlying_arguments(cute::make_shape(m, args.order.columns, k, l), args, workspace), rows,
            tail ? map(tail, m - first, 1, 4) : rows, tail ? int(first / kGradTailTile) : INT_MAX};
  }

  CUTLASS_DEVICE static void prefetch_tma_descriptors(Params const& params) {
    cute::prefetch_tma_descriptor(&params.rows);
    if (params.tail_tile != INT_MAX) cute::prefetch_tma_descriptor(&params.tail);
    cute::prefetch_tma_descriptor(params.tma_load_b.get_tma_descriptor());
  }

  template <class TensorA, class TensorB, class KTileIterator, class BlockCoord>
  CUTLASS_DEVICE void load(Params const& params, MainloopPipeline pipeline, PipelineState write,
                           cute::tuple<TensorA, TensorB> const& inputs, BlockCoord const& coord, KTileIterator k_tile,
                           int k_tiles, int, uint32_t rank_in_cluster, TensorStorage& shared) {
    using namespace cute;
    if (!elect_one_sync()) return;
    const Tensor b = make_tensor(make_smem_ptr(shared.smem_B.data()), typename Base::SmemLayoutB{});
    const auto [m, n, _k, l] = coord;
    // The columns of B are the cluster's: each CTA loads half of them, for both.
    const auto copy_b = params.tma_load_b.get_slice(rank_in_cluster);
    const Tensor from_b = copy_b.partition_S(get<1>(inputs)(_, _, n, _, l));  // (TMA, TMA_N, TMA_K, k)
    const Tensor to_b = copy_b.partition_D(b);                                // (TMA, TMA_N, TMA_K, stage)
    constexpr int kTile = size<0>(TileShape{}) * size<2>(TileShape{});
    constexpr uint16_t kBoth = 3;
    constexpr auto kHint = static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_NORMAL);
    const bool in_tail = int(m) >= params.tail_tile;
    const auto* rows = in_tail ? &params.tail : &params.rows;
    const int first_w = (int(m) - (in_tail ? params.tail_tile : 0)) * 4;
    CUTLASS_PRAGMA_NO_UNROLL
    for (; k_tiles > 0; --k_tiles, ++k_tile, ++write) {
      pipeline.producer_acquire(write);
      auto* barrier = pipeline.producer_get_barrier(write);
      SM90_TMA_LOAD_5D::copy(rows, barrier, kHint, shared.smem_A.data() + write.index() * kTile,
                             int(*k_tile) * kColumns, 0, 0, first_w, 0);
      copy(params.tma_load_b.with(*barrier, kBoth), from_b(_, _, _, *k_tile), to_b(_, _, _, write.index()));
    }
  }
};

}  // namespace sparse24::cuda
