// An order of features along N in which a lane of an epilogue holds runs of neighbours.
//
// wgmma gives lane q of a quad columns 2q and 2q + 1 of each block of 8 (epilogues/base.cuh), so that neighbours lie in
// two lanes or more. But the mma does not care which feature a column is. With column 8 p + 2 q + e of a block of
// 4 kRun columns being its feature kRun q + 2 p + e, lane q holds features kRun q .. kRun q + kRun - 1 of two rows:
// groups of four, and what fills a store, without an exchange. mainloops/permuted_n_copies.cuh reads the rows of w that
// way.
#pragma once

#include <cute/config.hpp>

namespace sparse24::cuda {

template <int kRun_>
struct PermutedN {
  static constexpr int kRun = kRun_, kBlock = 4 * kRun;
  static constexpr int kPairs = kRun / 2;  // of features in a run

  // Returns the feature that a column of the tile is.
  CUTE_HOST_DEVICE static constexpr int feature(int column) {
    const int pair = column % kBlock / 8, q = column % 8 / 2;
    return column / kBlock * kBlock + kRun * q + 2 * pair + column % 2;
  }
};

}  // namespace sparse24::cuda
