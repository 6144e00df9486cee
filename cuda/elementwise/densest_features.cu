// densest_features: the features that the most tokens use.
#include <cuda_runtime.h>

#include "common/launch.cuh"
#include "elementwise/densest_features.cuh"
#include "sparse24/densest_features.h"

namespace sparse24::cuda {
namespace {

// One block: counts are few enough for one multiprocessor to read again and again out of its L1 cache, and blocks that
// wait for each other would take longer than that.
__global__ void __launch_bounds__(kDensestThreads)
    densest_features_kernel(const int32_t* __restrict__ counts, unsigned features, int k, int64_t* __restrict__ out) {
  __shared__ DensestShared shared;
  const Threshold threshold = find_threshold(counts, features, k, shared);
  write_features(counts, features, threshold, out, shared);
}

}  // namespace

void densest_features(const DensestFeaturesArgs& args, cudaStream_t stream) {
  if (args.k == 0) return;
  densest_features_kernel<<<1, kDensestThreads, 0, stream>>>(args.counts, static_cast<unsigned>(args.features),
                                                             static_cast<int>(args.k), args.out);
  check_launch("densest_features");
}

}  // namespace sparse24::cuda
