/// @file
/// The reference of spread_scales and next_scales.
#include "sparse24/step_scales.h"

#include <algorithm>

namespace sparse24::cpu {

void spread_scales(const SpreadScalesArgs& args) {
  std::fill(args.places, args.places + kStepScales * kStepScaleStride, 0.0f);
  for (int64_t i = 0; i < kDelayedScales; ++i) args.places[i * kStepScaleStride] = args.delayed[i];
  if (args.of_w1) args.places[place_of(StepScale::kW1)] = *args.of_w1;
  if (args.of_w2) args.places[place_of(StepScale::kW2)] = *args.of_w2;
}

void next_scales(const NextScalesArgs& args) {
  for (int64_t i = 0; i < kDelayedScales; ++i) args.next[i] = next_scale(args, i);
}

}  // namespace sparse24::cpu
