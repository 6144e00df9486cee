// The walk of a warp that loads over the tiles of its CTA, each of which it must find before it can begin with it.
#pragma once

#include <utility>

#include "gemm/sm90/schedulers/scheduler.cuh"

namespace sparse24::cuda {

// find() finds the first tile: a kernel calls it where the warp would wait anyway.
template <class Scheduler>
class TileWalk {
 public:
  CUTLASS_DEVICE explicit TileWalk(Scheduler const& scheduler) : scheduler_(scheduler), i_(scheduler_.first()) {}

  CUTLASS_DEVICE void find() {
    valid_ = scheduler_.has_tile(i_);
    if (valid_) at_ = scheduler_.tile(i_);
  }
  CUTLASS_DEVICE void advance() {
    i_ += scheduler_.stride();
    find();
  }

  CUTLASS_DEVICE bool valid() const { return valid_; }
  CUTLASS_DEVICE auto const& place() const { return at_; }

 private:
  using Index = decltype(std::declval<Scheduler>().first());
  Scheduler const& scheduler_;
  Index i_;
  decltype(std::declval<Scheduler>().tile(Index{})) at_;
  bool valid_;
};

}  // namespace sparse24::cuda
