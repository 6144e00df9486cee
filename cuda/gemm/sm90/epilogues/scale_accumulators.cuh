// The scaling of a lane's accumulators: acc * scale of the row * scale of the column + shift of the column.
//
// Few mma run while threads take their accumulators, which costs a tile of fp8 1,000 cycles. So the operands of the
// first columns are in registers before the mma are done, and those of the next columns come while some are scaled.
#pragma once

#include <cutlass/cutlass.h>

#include "gemm/sm90/epilogues/operands.cuh"

namespace sparse24::cuda {

template <class Operands_>
class AccumulatorScales {
 public:
  using Operands = Operands_;
  Operands const& operands;
  const int row;  // the lane's first row in the tile; its other is 8 rows below

  CUTLASS_DEVICE AccumulatorScales(Operands const& operands, int row)
      : operands(operands), row(row), row_scales_{operands.rows[row].scale, operands.rows[row + 8].scale} {
    read(0);
  }

  // Scales the first kBlocks blocks of 8 columns, and hands each to out.pack(block, two columns of the first row, two
  // of the other).
  template <int kBlocks, class Fragment, class Out>
  CUTLASS_DEVICE void scale(Fragment const& acc, Out& out) {
    static_assert(kBlocks % kAhead == 0, "whole batches");
    CUTLASS_PRAGMA_UNROLL
    for (int first = 0; first < kBlocks; first += kAhead) {
      typename Operands::Columns columns[kAhead];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kAhead; ++i) columns[i] = ahead_[i];
      if (first + kAhead < kBlocks) read(first + kAhead);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        float v[4];
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < 4; ++j)
          v[j] = acc(4 * (first + i) + j) * row_scales_[j / 2] * columns[i].scale[j % 2] + columns[i].shift[j % 2];
        out.pack(first + i, v[0], v[1], v[2], v[3]);
      }
    }
  }

 private:
  static constexpr int kAhead = 4;  // blocks

  CUTLASS_DEVICE void read(int first) {
    asm volatile("" ::: "memory");  // these are read no sooner, because no registers are left for them
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kAhead; ++i) ahead_[i] = operands.columns[4 * (first + i) + (threadIdx.x & 3)];
  }

  const float row_scales_[2];
  typename Operands::Columns ahead_[kAhead];
};

}  // namespace sparse24::cuda
