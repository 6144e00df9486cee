// mm_active as the second product of a network.
#pragma once

#include "sparse24/mm_active.h"

namespace sparse24::cuda {

struct ActiveLaunch;

// The tokens of a launch.
constexpr int64_t kActiveTokens = 8;

// The launch of `tokens` tokens from `first` on.
ActiveLaunch active_launch(const MmActiveArgs& args, int64_t first, int64_t tokens);
// Whether w can be copied eight columns at a time.
bool active_vectors(const MmActiveArgs& args);
// Adds up what the kernel before it has written.
void launch_add_active_sums(const ActiveLaunch& launch, cudaStream_t stream);

// `dependent`: started before the kernel in front of it is complete, which writes y.
void launch_mm_active(bool dependent, const MmActiveArgs& args, cudaStream_t stream);

}  // namespace sparse24::cuda
