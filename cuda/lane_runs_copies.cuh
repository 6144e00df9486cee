// Copies of the rows of a K-major operand w (of mm: B) in the order of lane_runs.cuh.
//
// A tensor map of five dimensions says where they lie; the whole blocks of w have one, its last rows, if they are no
// block, another, so that what is read beyond them is zeros:
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

#include "lane_runs.cuh"
#include "tensor_map.cuh"

namespace sparse24::cuda {

// Mainloop: a collective of CUTLASS's with B K-major, K tiles of 128 bytes and clusters of two CTAs. Two along M share
// the rows of w, of which each loads half of the blocks for both, or where they are odd in number half of every block.
template <class Mainloop, class Runs>
class LaneRunsCopies {
  using Element = typename Mainloop::ElementB;
  using Cluster = typename Mainloop::DispatchPolicy::ClusterShape;
  static constexpr int kTileN = cute::size<1>(typename Mainloop::TileShape{});
  static constexpr int kTileK = cute::size<2>(typename Mainloop::TileShape{});
  static constexpr int kBlocks = kTileN / Runs::kBlock;

 public:
  static constexpr bool kShared = cute::size<0>(Cluster{}) == 2;  // the rows of w

  struct Params {
    cute::TmaDescriptor blocks, last;
    int whole;     // blocks
    bool more;     // rows than those
    bool in_runs;  // else in their own order
  };

  // w: n rows of k columns, ld apart.
  static Params of(const Element* w, int64_t ld, int n, int64_t k, bool in_runs, const char* what) {
    if (!in_runs) {
      const MapDim dims[] = {{1, k, kTileK}, {ld, n, 8 * kPairs}, {ld, 1, 1}, {ld, 1, 1}, {ld, 1, 1}};
      const auto map = map_rows(w, dims, what);
      return {map, map, 0, false, false};
    }
    const int whole = n / Runs::kBlock, runs = n % Runs::kBlock / Runs::kRun;
    const auto map = [&](const Element* first, int64_t lanes, int64_t count) {
      // No dimension may be empty; one that is serves no copy.
      const MapDim dims[] = {{1, k, kTileK},
                             {ld, 2, 2},
                             {Runs::kRun * ld, cute::max(lanes, int64_t{1}), 4},
                             {2 * ld, Runs::kPairs, kPairs},
                             {Runs::kBlock * ld, cute::max(count, int64_t{1}), 1}};
      return map_rows(first, dims, what);
    };
    const Element* last = w + int64_t{whole} * Runs::kBlock * ld;
    return {map(w, 4, whole), map(last, runs, 1), whole, runs > 0, true};
  }

  CUTLASS_DEVICE static void prefetch(Params const& params) {
    cute::prefetch_tma_descriptor(&params.blocks);
    if (params.more) cute::prefetch_tma_descriptor(&params.last);
  }

  // One CTA's share of tile n of the rows, and of the 128 bytes from `column` on, to a stage's buffer.
  template <class Barrier>
  CUTLASS_DEVICE static void load(Params const& params, Barrier* barrier, Element* stage, int n, int column,
                                  int rank_in_cluster) {
    using namespace cute;
    constexpr uint16_t kBoth = 3;
    constexpr auto kHint = static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_NORMAL);
    const int pair = kHalfBlocks ? rank_in_cluster * kPairs : 0;
    const int skipped = kShared && !kHalfBlocks ? rank_in_cluster * kCopies : 0;  // blocks
    Element* to = stage + (skipped * Runs::kBlock + 8 * pair) * kTileK;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kCopies; ++i, to += Runs::kBlock * kTileK) {
      const int block = n * kBlocks + skipped + i;
      const bool last = params.more && block == params.whole;
      const auto* map = last ? &params.last : &params.blocks;
      const int row = params.in_runs ? 0 : block * Runs::kBlock + 8 * pair;
      const int of_pairs = params.in_runs ? pair : 0, of_blocks = params.in_runs && !last ? block : 0;
      if constexpr (kShared) {
        SM90_TMA_LOAD_MULTICAST_5D::copy(map, barrier, kBoth, kHint, to, column, row, 0, of_pairs, of_blocks);
      } else {
        SM90_TMA_LOAD_5D::copy(map, barrier, kHint, to, column, row, 0, of_pairs, of_blocks);
      }
    }
  }

 private:
  static constexpr bool kHalfBlocks = kShared && kBlocks % 2 != 0;
  static constexpr int kPairs = Runs::kPairs / (kHalfBlocks ? 2 : 1);              // of one copy
  static constexpr int kCopies = kShared && !kHalfBlocks ? kBlocks / 2 : kBlocks;  // of one CTA
  static_assert(kTileK * sizeof(Element) == 128 && kTileN % Runs::kBlock == 0, "whole blocks, rows of 128 bytes");
  static_assert(cute::size(Cluster{}) == 2, "two CTAs share one operand");
};

}  // namespace sparse24::cuda
