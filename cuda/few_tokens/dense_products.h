// The two products of relu2_mlp_dense, launched one behind the other.
#pragma once

#include <cuda_runtime_api.h>

#include "sparse24/relu2_mlp_dense.h"

namespace sparse24::cuda {

void dense_relu2(const LinearRelu2Args& args, cudaStream_t stream);
void dense_sum(const LinearOutArgs& args, cudaStream_t stream);

}  // namespace sparse24::cuda
