// The copies of the rows of B for the sparse mainloop in 16 bits, as they are or interleaved: row 4 g + i of the
// product is row i Q + g of B, where Q is a quarter of all rows. A tensor map of three dimensions reads them where they
// lie, so that weight gradients take x and the gradient of y in the order of the tokens.
//
//     dimension      columns of B   i                       g
//     interleaved    N, 64          4, Q rows apart, 4      Q, one row apart, 8    (size, and of one copy)
//     as they are    N, 64          K, one row apart, 32    1, 1
//
// The last K tile of a number of rows that is no multiple of four comes from a copy that is in the order of the
// product.
#pragma once

#include <cutlass/cutlass.h>

#include <climits>
#include <cute/tensor.hpp>

#include "gemm/sm90/mainloops/tensor_map.cuh"
#include "sparse24/token_order.h"

namespace sparse24::cuda {

// The rows of B for SparseRowsMainloop, with B MN-major: two CTAs along M load 32 of the 64 rows of a K tile each, for
// both.
template <class Base>
class InterleavedRows {
  using Element = typename Base::ElementB;
  using TileShape = typename Base::TileShape;
  static constexpr int kTileN = cute::size<1>(TileShape{}), kTileK = cute::size<2>(TileShape{});
  static constexpr int kColumns = 64;  // of one copy: rows of 128 bytes
  static_assert(sizeof(Element) == 2 && kTileN % kColumns == 0 && kTileK == 64, "blocks of 64 x 64");

 public:
  struct Params {
    cute::TmaDescriptor rows, tail;
    bool interleaved;
    int tail_tile;  // the K tile that `tail` has the rows of
  };

  template <class ProblemShape>
  static Params of(ProblemShape const& shape, typename Base::Arguments const& args, RowsOfB const& given) {
    const auto [m, n, k, l] = shape;
    const int64_t ld = cute::get<1>(args.dB), quarter = cute::max(k / 4, 1);
    const MapDim reordered[] = {{1, n, kColumns}, {quarter * ld, 4, 4}, {ld, quarter, kTileK / 8}};
    const MapDim as_they_are[] = {{1, n, kColumns}, {ld, k, kTileK / 2}, {ld, 1, 1}};
    const auto rows = map_rows(args.ptr_B, given.reordered ? reordered : as_they_are, "sparse24.mm");
    if (!given.tail) return {rows, rows, given.reordered, INT_MAX};
    const int64_t first = first_of_tail(k, kTileK);
    const MapDim last[] = {{1, n, kColumns}, {given.ld_tail, k - first, kTileK / 2}, {given.ld_tail, 1, 1}};
    const auto tail = map_rows(static_cast<const Element*>(given.tail), last, "sparse24.mm");
    return {rows, tail, given.reordered, int(first / kTileK)};
  }

  CUTLASS_DEVICE static void prefetch(Params const& params) {
    cute::prefetch_tma_descriptor(&params.rows);
    if (params.tail_tile != INT_MAX) cute::prefetch_tma_descriptor(&params.tail);
  }

  // One CTA's share of a K tile, to a stage's buffer: blocks of 64 columns, in each 64 rows of 128 bytes.
  template <class Barrier>
  CUTLASS_DEVICE static void load(Params const& params, Barrier* barrier, Element* stage, int n, int, int k_tile,
                                  int rank_in_cluster) {
    using namespace cute;
    constexpr uint16_t kBoth = 3;
    constexpr auto kHint = static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_NORMAL);
    Element* to = stage + rank_in_cluster * (kTileK / 2 * kColumns);
    const bool in_tail = k_tile == params.tail_tile, in_groups = params.interleaved && !in_tail;
    const auto* rows = in_tail ? &params.tail : &params.rows;
    const int row = (in_tail ? 0 : k_tile * kTileK) + rank_in_cluster * (kTileK / 2);
    CUTLASS_PRAGMA_UNROLL
    for (int c = 0; c < kTileN; c += kColumns) {
      SM90_TMA_LOAD_MULTICAST_3D::copy(rows, barrier, kBoth, kHint, to + c * kTileK, n * kTileN + c,
                                       in_groups ? 0 : row, in_groups ? row / 4 : 0);
    }
  }
};

}  // namespace sparse24::cuda
