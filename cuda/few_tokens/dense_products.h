// The two products of relu2_mlp_dense, launched one behind the other.
#pragma once

#include <cuda_runtime_api.h>

#include "few_tokens/dense_few.h"
#include "sparse24/relu2_mlp_dense.h"

namespace sparse24::cuda {

// Zeroes the counters of the product behind.
void dense_relu2(const LinearRelu2Args& args, unsigned* counters, int count, cudaStream_t stream);

DenseWalk walk_of(const LinearOutArgs& args);
int64_t dense_sum_bytes(const LinearOutArgs& args);
void dense_sum(const LinearOutArgs& args, float* sums, unsigned* counters, cudaStream_t stream);

}  // namespace sparse24::cuda
