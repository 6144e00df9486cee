// The rows that linear_gradient and linear_gradient_fp8 keep whole, as their kernels look for them.
#pragma once

#include "sparse24/linear_gradient_fp8.h"

namespace sparse24::cuda {

// Fills args.hot_slots, and the rows of y_hot and dh_hot whose index is no feature's.
void hot_slots(const LinearGradientArgs& args, cudaStream_t stream);
void hot_slots(const LinearGradientFp8Args& args, cudaStream_t stream);

}  // namespace sparse24::cuda
