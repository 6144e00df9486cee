// The two products of relu2_mlp_dense, launched one behind the other.
#pragma once

#include <cuda_runtime_api.h>

#include "few_tokens/dense_few.h"
#include "sparse24/relu2_mlp_dense.h"

namespace sparse24::cuda {

// How they are walked where the caller does not leave it to the launchers: for tuning.
struct DenseTuning {
  int slices = 4, tiles = 0, stages = 0;
};

// Zeroes the counters of the product behind.
void dense_relu2(const LinearRelu2Args& args, unsigned* counters, int count, const DenseTuning& tuning,
                 cudaStream_t stream);

DenseWalk walk_of(const LinearOutArgs& args, const DenseTuning& tuning);
int64_t dense_sum_bytes(const LinearOutArgs& args, const DenseTuning& tuning);
void dense_sum(const LinearOutArgs& args, float* sums, unsigned* counters, const DenseTuning& tuning,
               cudaStream_t stream);

}  // namespace sparse24::cuda
