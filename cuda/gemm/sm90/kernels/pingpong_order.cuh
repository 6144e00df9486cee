// Who waits for whom in CUTLASS's pingpong kernel: mainloops take turns, epilogues do not.
//
// The kernel lets its two warpgroups take turns twice a tile: with the mainloop, so that one multiplies while the other
// stores, and with the epilogue, because CUTLASS's epilogues share a staging buffer. Ours share nothing. Without the
// second turn an epilogue that is longer than a mainloop runs beside that of the other warpgroup, and a tile takes half
// of both together, not all of the epilogue.
#pragma once

#include <cutlass/cutlass.h>

#include <cutlass/pipeline/pipeline.hpp>

namespace cutlass {

// The barrier of that kernel alone (sm90_gemm_tma_warpspecialized_pingpong.hpp): two turns of two warpgroups.
template <>
class OrderedSequenceBarrier<2, 2> : public OrderedSequenceBarrier<1, 2> {
  using Mainloops = OrderedSequenceBarrier<1, 2>;

 public:
  using Mainloops::Mainloops;

  CUTLASS_DEVICE void wait() {
    if (!in_epilogue_) Mainloops::wait();
  }
  CUTLASS_DEVICE void arrive() {
    if (!in_epilogue_) Mainloops::arrive();
    in_epilogue_ = !in_epilogue_;
  }

 private:
  bool in_epilogue_ = false;
};

}  // namespace cutlass

// The kernels that use it.
#include <cutlass/gemm/kernel/gemm_universal.hpp>
