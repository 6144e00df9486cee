// The copies of the columns of w [experts, k, n] for a tile of one expert, in the order that they have: w is the
// MN-major operand B, as backward passes find the weights of the forward.
//
//     dimension      columns of w   row           expert
//     size           n              k             experts
//     of one copy    64             32, half a    1
//                                   K tile
//
// What lies beyond the expert's columns and rows reads as zeros.
#pragma once

#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>

#include "gemm/sm90/mainloops/tensor_map.cuh"

namespace sparse24::cuda {

// Mainloop is a collective of CUTLASS's with B MN-major in 16 bits, K tiles of 64 and clusters of two CTAs along M. It
// is what ExpertRows is to a K-major B.
template <class Mainloop>
class ExpertColumns {
  using Element = typename Mainloop::ElementB;
  using Cluster = typename Mainloop::DispatchPolicy::ClusterShape;
  static constexpr int kTileN = cute::size<1>(typename Mainloop::TileShape{});
  static constexpr int kTileK = cute::size<2>(typename Mainloop::TileShape{});
  static constexpr int kColumns = 64, kRows = kTileK / 2;  // of one copy: rows of 128 bytes
  static_assert(sizeof(Element) == 2 && kTileN % kColumns == 0 && kTileK == 64, "blocks of 64 x 64");
  static_assert(cute::size<0>(Cluster{}) == 2 && cute::size<1>(Cluster{}) == 1, "two CTAs along M");

 public:
  struct Layout {
    MapDim dims[3];
  };
  struct Params {
    cute::TmaDescriptor columns;
  };

  static Layout layout(int64_t n, int64_t k, int64_t experts) {
    return {{{1, n, kColumns}, {n, k, kRows}, {k * n, experts, 1}}};
  }
#ifdef __CUDACC__
  static Params of(const Element* w, int64_t n, int64_t k, int64_t experts, const char* what) {
    return {map_rows(w, layout(n, k, experts).dims, what)};
  }
#endif

  CUTLASS_DEVICE static void prefetch(Params const& params) { cute::prefetch_tma_descriptor(&params.columns); }

  // Lists one CTA's copies of a K tile, which are all, or half of each block that the cluster shares: copy(element of
  // the stage, column of the tile, row of the K tile). A stage has 64 rows of 128 bytes for each block of columns.
  template <bool kShared, class Copy>
  CUTLASS_HOST_DEVICE static void each(int rank, Copy copy) {
    CUTLASS_PRAGMA_UNROLL
    for (int column = 0; column < kTileN; column += kColumns) {
      CUTLASS_PRAGMA_UNROLL
      for (int half = 0; half < (kShared ? 1 : 2); ++half) {
        const int row = (kShared ? rank : half) * kRows;
        copy(column * kTileK + row * kColumns, column, row);
      }
    }
  }

  // As that of ExpertRows; `column` is the first row of the K tile.
  template <class Load>
  CUTLASS_DEVICE static void with_copies(Params const& params, int n, int expert, int rank, bool shared, Load load) {
    using namespace cute;
    constexpr auto kHint = static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_NORMAL);
    if (shared) {
      load([&](auto* barrier, Element* stage, int k) {
        constexpr uint16_t kBoth = 3;
        each<true>(rank, [&](int to, int column, int row) {
          SM90_TMA_LOAD_MULTICAST_3D::copy(&params.columns, barrier, kBoth, kHint, stage + to, n * kTileN + column,
                                           k + row, expert);
        });
      });
    } else {
      load([&](auto* barrier, Element* stage, int k) {
        each<false>(rank, [&](int to, int column, int row) {
          SM90_TMA_LOAD_3D::copy(&params.columns, barrier, kHint, stage + to, n * kTileN + column, k + row, expert);
        });
      });
    }
  }
};

}  // namespace sparse24::cuda
