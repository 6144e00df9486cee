// How the kernel of kernels/overlapped.cuh splits tiles of the last wave.
#pragma once

#include "gemm/sm90/mainloops/dense_mma.cuh"

namespace sparse24::cuda {

// The split of a kernel that splits no tile.
struct WholeTiles {
  static constexpr int kParts = 1;
};

// The split of a kernel whose scheduler may split the tiles of the last wave, into quarters of their columns. The
// load() of its Mainloop brings parts of B too (mainloops/permuted_n_mainloop.cuh).
template <class Mainloop, class WholeEpilogue>
struct SplitTiles {
  static constexpr int kParts = 4, kColumns = cute::size<1>(typename Mainloop::TileShape{}) / kParts;
  using Mma = DenseMma<Mainloop, kColumns>;
  using Epilogue = typename WholeEpilogue::template WithColumns<kColumns>;
};

}  // namespace sparse24::cuda
