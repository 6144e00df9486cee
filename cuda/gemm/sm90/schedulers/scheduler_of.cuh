// The schedulers by the names that a row of tiles.def gives them.
#pragma once

#include "gemm/sm90/schedulers/cutlass_scheduler.cuh"
#include "gemm/sm90/schedulers/wave_scheduler.cuh"
#include "sparse24/gemm.h"

namespace sparse24::cuda {

template <Scheduler, int kClusterM, int kClusterN, int kParts>
struct SchedulerNamed;
template <int kClusterM, int kClusterN>
struct SchedulerNamed<Scheduler::kCutlass, kClusterM, kClusterN, 1> {
  using type = CutlassScheduler<kClusterM, kClusterN>;
};
template <int kClusterM, int kParts>
struct SchedulerNamed<Scheduler::kWaves, kClusterM, 1, kParts> {
  using type = WaveScheduler<kClusterM, kParts>;
};

// kParts: of a split tile.
template <Scheduler kScheduler, int kClusterM, int kClusterN, int kParts = 1>
using SchedulerOf = typename SchedulerNamed<kScheduler, kClusterM, kClusterN, kParts>::type;

}  // namespace sparse24::cuda
