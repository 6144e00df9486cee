// The copies of the rows of a K-major operand w (of mm: B) in the order of epilogues/permuted_n.cuh.
//
// A tensor map of five dimensions says where they lie. The whole blocks of w have one, and its last rows, if they are
// no block, another, so that what is read beyond them is zeros:
//
//     dimension        columns of w   e    q                p               block
//     rows apart       -              1    kRun             2               4 kRun
//     size, blocks     K              2    4                kRun / 2        rows / (4 kRun)
//           last       K              2    runs that are    kRun / 2        1
//     of one copy      128 bytes      2    4                kRun / 2, or    1
//                                                           half of them
//
// Rows in their own order have a map of two, and any number.
#pragma once

#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>

#include "gemm/sm90/epilogues/permuted_n.cuh"
#include "gemm/sm90/mainloops/tensor_map.cuh"

namespace sparse24::cuda {

// Mainloop is a collective of CUTLASS's with B K-major, K tiles of 128 bytes and clusters of two CTAs. Two along M
// share the rows of w: each loads half of the blocks for both, or, where these are odd in number, half of every block.
template <class Mainloop, class Permutation>
class PermutedNCopies {
  using Element = typename Mainloop::ElementB;
  using Cluster = typename Mainloop::DispatchPolicy::ClusterShape;
  static constexpr int kTileN = cute::size<1>(typename Mainloop::TileShape{});
  static constexpr int kTileK = cute::size<2>(typename Mainloop::TileShape{});
  static constexpr int kBlocks = kTileN / Permutation::kBlock;

 public:
  static constexpr bool kShared = cute::size<0>(Cluster{}) == 2;  // the rows of w

  // Where whole blocks and the last rows lie.
  struct Rows {
    const Element* start;
    MapDim dims[5];
  };
  struct Order {
    int whole;      // blocks
    bool more;      // rows than those
    bool permuted;  // else in their own order
  };
  struct Layout {
    Rows blocks, last;
    Order order;
  };
  struct Params {
    cute::TmaDescriptor blocks, last;
    Order order;
  };

  // Describes w, whose n rows of k columns lie ld apart.
  static Layout layout(const Element* w, int64_t ld, int n, int64_t k, bool permuted) {
    if (!permuted) {
      const Rows rows{w, {{1, k, kTileK}, {ld, n, 8 * kPairs}, {ld, 1, 1}, {ld, 1, 1}, {ld, 1, 1}}};
      return {rows, rows, {0, false, false}};
    }
    const int whole = n / Permutation::kBlock, runs = n % Permutation::kBlock / Permutation::kRun;
    const auto rows = [&](const Element* first, int64_t lanes, int64_t count) {
      // No dimension may be empty; one that is serves no copy.
      return Rows{first,
                  {{1, k, kTileK},
                   {ld, 2, 2},
                   {Permutation::kRun * ld, cute::max(lanes, int64_t{1}), 4},
                   {2 * ld, Permutation::kPairs, kPairs},
                   {Permutation::kBlock * ld, cute::max(count, int64_t{1}), 1}}};
    };
    return {rows(w, 4, whole), rows(w + int64_t{whole} * Permutation::kBlock * ld, runs, 1), {whole, runs > 0, true}};
  }
  static Params of(const Element* w, int64_t ld, int n, int64_t k, bool permuted, const char* what) {
    const Layout l = layout(w, ld, n, k, permuted);
    return {map_rows(l.blocks.start, l.blocks.dims, what), map_rows(l.last.start, l.last.dims, what), l.order};
  }

  CUTLASS_DEVICE static void prefetch(Params const& params) {
    cute::prefetch_tma_descriptor(&params.blocks);
    if (params.order.more) cute::prefetch_tma_descriptor(&params.last);
  }

  // Lists one CTA's copies of the n-th kRows rows, those of a tile, or of a part of one that whole blocks make up. It
  // calls copy(whether these are the last rows, row of the stage, coordinates 1, 3 and 4).
  template <int kRows = kTileN, class Copy>
  CUTLASS_HOST_DEVICE static void each(Order const& order, int n, int rank_in_cluster, Copy copy) {
    constexpr int kCount = kRows / Permutation::kBlock;
    constexpr bool kShares = kShared && !kHalfBlocks;             // each CTA has half of the blocks
    constexpr int kCopies = kShares ? (kCount + 1) / 2 : kCount;  // of one CTA
    static_assert(kRows == kTileN || (kRows % Permutation::kBlock == 0 && kShares), "parts are read in whole blocks");
    const int pair = kHalfBlocks ? rank_in_cluster * kPairs : 0;
    const int skipped = kShares ? rank_in_cluster * kCopies : 0;  // blocks
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kCopies; ++i) {
      if (kCount % 2 != 0 && kShares && skipped + i == kCount) break;  // one block: the first CTA's
      const int block = n * kCount + skipped + i, to = (skipped + i) * Permutation::kBlock + 8 * pair;
      const bool last = order.more && block == order.whole;
      copy(last, to, order.permuted ? 0 : block * Permutation::kBlock + 8 * pair, order.permuted ? pair : 0,
           order.permuted && !last ? block : 0);
    }
  }

  // Issues these copies for the 128 bytes from `column` on, to a stage's buffer.
  template <int kRows = kTileN, class Barrier>
  CUTLASS_DEVICE static void load(Params const& params, Barrier* barrier, Element* stage, int n, int column,
                                  int rank_in_cluster) {
    using namespace cute;
    constexpr uint16_t kBoth = 3;
    constexpr auto kHint = static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_NORMAL);
    each<kRows>(params.order, n, rank_in_cluster, [&](bool last, int to, int row, int pairs, int block) {
      const auto* map = last ? &params.last : &params.blocks;
      if constexpr (kShared) {
        SM90_TMA_LOAD_MULTICAST_5D::copy(map, barrier, kBoth, kHint, stage + to * kTileK, column, row, 0, pairs, block);
      } else {
        SM90_TMA_LOAD_5D::copy(map, barrier, kHint, stage + to * kTileK, column, row, 0, pairs, block);
      }
    });
  }

 private:
  static constexpr bool kHalfBlocks = kShared && kBlocks % 2 != 0;
  static constexpr int kPairs = Permutation::kPairs / (kHalfBlocks ? 2 : 1);  // of one copy
  static_assert(kTileK * sizeof(Element) == 128 && kTileN % Permutation::kBlock == 0,
                "whole blocks, rows of 128 bytes");
  static_assert(cute::size(Cluster{}) == 2, "two CTAs share one operand");
};

}  // namespace sparse24::cuda
