// spread_scales and next_scales: a few numbers, one launch each where torch takes one for every operation.
#include <cuda_runtime.h>

#include "common/launch.cuh"
#include "sparse24/step_scales.h"

namespace sparse24::cuda {
namespace {

__global__ void spread_scales_kernel(const SpreadScalesArgs args) {
  const int i = int(threadIdx.x), place = i / int(kStepScaleStride);
  const float* given = i % kStepScaleStride != 0            ? nullptr
                       : place < kDelayedScales             ? args.delayed + place
                       : i == int(place_of(StepScale::kW1)) ? args.of_w1
                       : i == int(place_of(StepScale::kW2)) ? args.of_w2
                                                            : nullptr;
  args.places[i] = given ? *given : 0.f;
}

__global__ void next_scales_kernel(const NextScalesArgs args) {
  args.next[threadIdx.x] = next_scale(args, threadIdx.x);
}

}  // namespace

void spread_scales(const SpreadScalesArgs& args, cudaStream_t stream) {
  spread_scales_kernel<<<1, kStepScales * kStepScaleStride, 0, stream>>>(args);
  check_launch("spread_scales");
}

void next_scales(const NextScalesArgs& args, cudaStream_t stream) {
  next_scales_kernel<<<1, kDelayedScales, 0, stream>>>(args);
  check_launch("next_scales");
}

}  // namespace sparse24::cuda
