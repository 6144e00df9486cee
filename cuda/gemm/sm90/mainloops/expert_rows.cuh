// The copies of the rows of w [experts, n, k] for a tile of one expert, in the order of epilogues/permuted_n.cuh.
//
// Five dimensions are all that a tensor map has, and that order takes them for one matrix
// (mainloops/permuted_n_copies.cuh). An expert's rows begin at any multiple of a run, so that the fifth dimension of
// whole blocks counts rows: blocks overlap in it. The last rows of each expert, if they are no block, have a map whose
// fifth dimension counts experts, so that what is read beyond them is zeros:
//
//     dimension        columns of w   e    q                p              first row     expert
//     rows apart       -              1    kRun             2              1             n
//     size, blocks     k              2    4                kRun / 2       experts * n - 4 kRun + 1
//           last       k              2    runs that are    kRun / 2                     experts
//     of one copy      128 bytes      2    4                kRun / 2, or   1             1
//                                                           half of them
#pragma once

#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>

#include "gemm/sm90/epilogues/permuted_n.cuh"
#include "gemm/sm90/mainloops/tensor_map.cuh"

namespace sparse24::cuda {

// Mainloop is a collective of CUTLASS's with B K-major, K tiles of 128 bytes and clusters of two CTAs along M.
template <class Mainloop, class Permutation>
class ExpertRows {
  using Element = typename Mainloop::ElementB;
  using Cluster = typename Mainloop::DispatchPolicy::ClusterShape;
  static constexpr int kTileN = cute::size<1>(typename Mainloop::TileShape{});
  static constexpr int kTileK = cute::size<2>(typename Mainloop::TileShape{});
  static constexpr int kBlock = Permutation::kBlock, kBlocks = kTileN / kBlock;
  // Two CTAs share an odd number of blocks by halves.
  static constexpr int kHalves = kBlocks % 2 == 0 ? 1 : 2, kPairs = Permutation::kPairs / kHalves;
  static_assert(kTileK * sizeof(Element) == 128 && kTileN % kBlock == 0, "whole blocks, rows of 128 bytes");
  static_assert(cute::size<0>(Cluster{}) == 2 && cute::size<1>(Cluster{}) == 1, "two CTAs along M");

 public:
  // Where whole blocks and the last rows lie.
  struct Rows {
    const Element* start;
    MapDim dims[5];
  };
  struct Order {
    int n, whole, firsts;  // rows of an expert; its whole blocks; rows that a block may begin with
  };
  struct Layout {
    Rows blocks, last;
    Order order;
  };
  struct Params {
    cute::TmaDescriptor blocks, last;
    Order order;
  };

  // Describes w [experts, n, k].
  static Layout layout(const Element* w, int64_t n, int64_t k, int64_t experts) {
    const int64_t whole = n / kBlock, runs = n % kBlock / Permutation::kRun;
    // No dimension may be empty; one that is serves no copy.
    const int64_t firsts = cute::max(experts * n - kBlock + 1, int64_t{1});
    const auto rows = [&](const Element* first, int64_t lanes, MapDim outermost) {
      return Rows{first,
                  {{1, k, kTileK},
                   {k, 2, 2},
                   {Permutation::kRun * k, cute::max(lanes, int64_t{1}), 4},
                   {2 * k, Permutation::kPairs, kPairs},
                   outermost}};
    };
    return {rows(w, 4, {k, firsts, 1}),
            rows(w + whole * kBlock * k, runs, {n * k, experts, 1}),
            {int(n), int(whole), int(firsts)}};
  }
#ifdef __CUDACC__
  static Params of(const Element* w, int64_t n, int64_t k, int64_t experts, const char* what) {
    const Layout l = layout(w, n, k, experts);
    const auto blocks = map_rows(l.blocks.start, l.blocks.dims, what);
    return {blocks, has_last(l.order) ? map_rows(l.last.start, l.last.dims, what) : blocks, l.order};
  }
#endif

  CUTLASS_DEVICE static void prefetch(Params const& params) {
    cute::prefetch_tma_descriptor(&params.blocks);
    if (has_last(params.order)) cute::prefetch_tma_descriptor(&params.last);
  }

  // The copies of one tile, found once for all of its K tiles: one thread issues them, and is as slow as they are long.
  struct Tile {
    int block, row;  // of the expert, the tile's first; of w, where that block begins
    int expert, rank;
    bool in_whole;  // the tile has whole blocks of the expert alone
  };
  CUTLASS_HOST_DEVICE static Tile tile(Order const& order, int n, int expert, int rank) {
    const int block = n * kBlocks;
    return {block, expert * order.n + block * kBlock, expert, rank, block + kBlocks <= order.whole};
  }

  // Lists one CTA's copies: copy(whether these are the last rows, row of the stage, pair, coordinate 4). Blocks beyond
  // the expert are zeros: metadata has a pattern for those that share its atom with the last of the expert.
  template <bool kShared, bool kInWhole, class Copy>
  CUTLASS_HOST_DEVICE static void each(Order const& order, Tile const& t, Copy copy) {
    constexpr int kCopies = kBlocks * kHalves / (kShared ? 2 : 1);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kCopies; ++i) {
      // With halves, the CTAs of a cluster have one of each block; without, every second block.
      const int in_tile = kHalves == 2 ? (kShared ? i : i / 2) : (kShared ? 2 * i + t.rank : i);
      const int pair = kHalves == 2 ? (kShared ? t.rank : i % 2) * kPairs : 0;
      const int to = in_tile * kBlock + 8 * pair, row = t.row + in_tile * kBlock, block = t.block + in_tile;
      if constexpr (kInWhole) {
        copy(false, to, pair, row);
      } else {
        const bool last = has_last(order) && block == order.whole;
        copy(last, to, pair, last ? t.expert : block < order.whole ? row : order.firsts);
      }
    }
  }

  // Calls load(the issuing of one CTA's copies of a tile), which is a function of barrier, stage's buffer and column:
  // the 128 bytes from there on. shared: the cluster shares the tile.
  template <class Load>
  CUTLASS_DEVICE static void with_copies(Params const& params, int n, int expert, int rank, bool shared, Load load) {
    const Tile t = tile(params.order, n, expert, rank);
    if (shared) {
      with<true>(params, t, load);
    } else {
      with<false>(params, t, load);
    }
  }

 private:
  template <bool kShared, class Load>
  CUTLASS_DEVICE static void with(Params const& params, Tile const& t, Load load) {
    if (t.in_whole) {
      load([&](auto* barrier, Element* stage, int column) { issue<kShared, true>(params, t, barrier, stage, column); });
    } else {
      load(
          [&](auto* barrier, Element* stage, int column) { issue<kShared, false>(params, t, barrier, stage, column); });
    }
  }
  template <bool kShared, bool kInWhole, class Barrier>
  CUTLASS_DEVICE static void issue(Params const& params, Tile const& t, Barrier* barrier, Element* stage, int column) {
    using namespace cute;
    constexpr uint16_t kBoth = 3;
    constexpr auto kHint = static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_NORMAL);
    each<kShared, kInWhole>(params.order, t, [&](bool last, int to, int pair, int outermost) {
      const auto* map = last ? &params.last : &params.blocks;
      Element* into = stage + to * kTileK;
      if constexpr (kShared) {
        SM90_TMA_LOAD_MULTICAST_5D::copy(map, barrier, kBoth, kHint, into, column, 0, 0, pair, outermost);
      } else {
        SM90_TMA_LOAD_5D::copy(map, barrier, kHint, into, column, 0, 0, pair, outermost);
      }
    });
  }
  // Whether experts have rows that are no block.
  CUTLASS_HOST_DEVICE static bool has_last(Order const& order) { return order.n % kBlock != 0; }
};

}  // namespace sparse24::cuda
