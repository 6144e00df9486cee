// Copies of the rows of B for the sparse mainloop in 16 bits, as they are or interleaved: row 4 g + i of the product is
// row i Q + g of B, Q a quarter of all rows. A tensor map of three dimensions reads them where they lie, so that weight
// gradients take x and the gradient of y in the order of the tokens.
//
//     dimension      columns of B   i                       g
//     interleaved    N, 64          4, Q rows apart, 4      Q, one row apart, 8    (size, and of one copy)
//     as they are    N, 64          K, one row apart, 32    1, 1
#pragma once

#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>

#include "tensor_map.cuh"

namespace sparse24::cuda {

// For SparseRowsMainloop, with B MN-major: two CTAs along M load 32 of the 64 rows of a K tile each, for both.
template <class Stock>
class InterleavedRows {
  using Element = typename Stock::ElementB;
  using TileShape = typename Stock::TileShape;
  static constexpr int kTileN = cute::size<1>(TileShape{}), kTileK = cute::size<2>(TileShape{});
  static constexpr int kColumns = 64;  // of one copy: rows of 128 bytes
  static_assert(sizeof(Element) == 2 && kTileN % kColumns == 0 && kTileK == 64, "blocks of 64 x 64");

 public:
  struct Params {
    cute::TmaDescriptor rows;
    bool interleaved;
  };

  template <class ProblemShape>
  static Params of(ProblemShape const& shape, typename Stock::Arguments const& args, bool interleaved) {
    const auto [m, n, k, l] = shape;
    const int64_t ld = cute::get<1>(args.dB), quarter = k / 4;
    const MapDim reordered[] = {{1, n, kColumns}, {quarter * ld, 4, 4}, {ld, quarter, kTileK / 8}};
    const MapDim as_they_are[] = {{1, n, kColumns}, {ld, k, kTileK / 2}, {ld, 1, 1}};
    return {map_rows(args.ptr_B, interleaved ? reordered : as_they_are, "sparse24.mm"), interleaved};
  }

  CUTLASS_DEVICE static void prefetch(Params const& params) { cute::prefetch_tma_descriptor(&params.rows); }

  // One CTA's share of a K tile, to a stage's buffer: blocks of 64 columns, in each 64 rows of 128 bytes.
  template <class Barrier>
  CUTLASS_DEVICE static void load(Params const& params, Barrier* barrier, Element* stage, int n, int, int k_tile,
                                  int rank_in_cluster) {
    using namespace cute;
    constexpr uint16_t kBoth = 3;
    constexpr auto kHint = static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_NORMAL);
    Element* to = stage + rank_in_cluster * (kTileK / 2 * kColumns);
    const int row = k_tile * kTileK + rank_in_cluster * (kTileK / 2);
    CUTLASS_PRAGMA_UNROLL
    for (int c = 0; c < kTileN; c += kColumns) {
      SM90_TMA_LOAD_MULTICAST_3D::copy(&params.rows, barrier, kBoth, kHint, to + c * kTileK, n * kTileN + c,
                                       params.interleaved ? 0 : row, params.interleaved ? row / 4 : 0);
    }
  }
};

}  // namespace sparse24::cuda
