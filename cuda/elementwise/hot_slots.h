// The rows that linear_gradient keeps whole, as its kernel looks for them.
#pragma once

#include "sparse24/linear_gradient.h"

namespace sparse24::cuda {

// Fills args.hot_slots, and the rows of y_hot and dh_hot whose index is no feature's.
void hot_slots(const LinearGradientArgs& args, cudaStream_t stream);

}  // namespace sparse24::cuda
