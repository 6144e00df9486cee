/// @file
/// The scales of a training step whose products are all float8: those of the step before, spread to where kernels and
/// cuBLAS read them, and those of the next step.
#pragma once

#include <cstdint>
#include <limits>

#include "sparse24/types.h"

namespace sparse24 {

/// What has a scale in a step, in the order of its places. The first four are delayed: given by the step before.
enum class StepScale : int64_t { kX, kY, kGrad, kDh, kW1, kW2, kUsedX };
inline constexpr int64_t kStepScales = 7, kDelayedScales = 4;
/// Floats from a place to the next one: cuBLAS wants scales at multiples of 16 bytes. Behind a scale stands the largest
/// magnitude that was seen of what it is of, and then how many entries saturated, an int32.
inline constexpr int64_t kStepScaleStride = 4, kLargestBehind = 1, kSaturatedBehind = 2;

SPARSE24_HD constexpr int64_t place_of(StepScale scale) { return static_cast<int64_t>(scale) * kStepScaleStride; }

/// places [kStepScales * kStepScaleStride] = the scales that are known, each at its place, and zeros.
struct SpreadScalesArgs {
  const float* delayed;        ///< [kDelayedScales]
  const float *of_w1, *of_w2;  ///< null where they are still to be found
  float* places;
};

/// next [kDelayedScales] = `next_scale` of what a step used and saw; not smaller than that of `current` where the scale
/// there is another by now, which another step has left.
struct NextScalesArgs {
  const float* places;           ///< of the step, with the largest magnitudes of x and y
  const float* current;          ///< [kDelayedScales]
  const float *of_grad, *of_dh;  ///< the largest magnitudes
  float* next;
};

/// The larger one, or NaN where one of them is, as torch.maximum has it.
SPARSE24_HD constexpr float larger_or_nan(float a, float b) {
  if (a != a || b != b) return std::numeric_limits<float>::quiet_NaN();
  return a > b ? a : b;
}

/// Room for twice the largest magnitude, and not less than half of what was used; that where there is none that counts.
SPARSE24_HD constexpr float next_scale(float used, float largest) {
  if (!(largest > 0 && largest <= std::numeric_limits<float>::max())) return used;
  return larger_or_nan(largest / kLargestE4M3 * 2.0f, used * 0.5f);
}

/// The delayed scale of a number, of the next step.
SPARSE24_HD constexpr float next_scale(const NextScalesArgs& args, int64_t i) {
  const float* place = args.places + i * kStepScaleStride;
  const float* largest = i == int64_t(StepScale::kGrad) ? args.of_grad
                         : i == int64_t(StepScale::kDh) ? args.of_dh
                                                        : place + kLargestBehind;
  const float used = *place, current = args.current[i], found = next_scale(used, *largest);
  return current == used ? found : larger_or_nan(found, current);
}

namespace cpu {
void spread_scales(const SpreadScalesArgs& args);
void next_scales(const NextScalesArgs& args);
}  // namespace cpu
namespace cuda {
void spread_scales(const SpreadScalesArgs& args, cudaStream_t stream);
void next_scales(const NextScalesArgs& args, cudaStream_t stream);
}  // namespace cuda

}  // namespace sparse24
