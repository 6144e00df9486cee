// feature_counts: non-zeros by feature, in blocks of 16 tokens of the 2:4 operand.
#include <cuda_runtime.h>

#include "common/launch.cuh"
#include "common/packed.cuh"
#include "sparse24/feature_counts.h"

namespace sparse24::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kGroups = 32;  // groups of four features that a block has, one for each lane
constexpr int kRows = int(FeatureCountsArgs::kBlock);

// The warps of a block share the sampled tokens of its features, 16 at a time, and add up what they have counted, which
// needs neither atomics nor zeros before. Elements are bits: Pair is two of them, and a number is zero if nothing but
// its sign is set. All loads of a kind are on their way before one is waited for; rows beyond the last read the padding
// of the metadata.
template <class Pair>
__global__ void __launch_bounds__(kThreads, 2) feature_counts_kernel(const FeatureCountsArgs args, Operand pattern) {
  constexpr int kBits = 4 * sizeof(Pair);  // bits of an element
  constexpr uint32_t kMagnitude = (uint32_t{1} << (kBits - 1)) - 1;
  __shared__ int counts[4][kWarps][kGroups];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t g = int64_t{blockIdx.x} * kGroups + lane;
  int of_feature[4] = {};
  for (int64_t block = warp; block < args.sampled_blocks() && 4 * g < args.a.k; block += kWarps) {
    const int64_t row0 = args.first_token(block);
    const int rows = int(min(int64_t{kRows}, args.a.m - row0));
    const auto* pairs = static_cast<const Pair*>(args.values) + row0 * (args.a.k / 4) + g;
    Pair pair[kRows];
    uint8_t nibble[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) pair[r] = r < rows ? pairs[r * (args.a.k / 4)] : Pair{0};
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      nibble[r] = args.meta[pattern.meta_byte(row0 + r, g)] >> Operand::meta_shift(g) & 0xf;
    uint32_t bytes = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      bytes += uint32_t((pair[r] & kMagnitude) != 0) << 8 * (nibble[r] & 3);
      const bool apart = nibble[r] >> 2 != (nibble[r] & 3);  // else the first one counts
      bytes += uint32_t(apart && (uint32_t(pair[r]) >> kBits & kMagnitude) != 0) << 8 * (nibble[r] >> 2);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) of_feature[i] += int(bytes >> 8 * i & 0xff);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) counts[i][warp][lane] = of_feature[i];
  __syncthreads();
  const int64_t feature = 4 * g + warp;
  if (warp >= 4 || feature >= args.a.k) return;
  int sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += counts[warp][w][lane];
  args.counts[feature] = sum;
}

}  // namespace

void feature_counts(const FeatureCountsArgs& args, cudaStream_t stream) {
  if (args.a.k == 0) return;
  if (args.a.m == 0) {
    return check_cuda(cudaMemsetAsync(args.counts, 0, args.a.k * sizeof(int32_t), stream), "cudaMemsetAsync");
  }
  const unsigned grid = unsigned(ceil_div(args.a.k / 4, kGroups));
  const bool bytes = args.a.dtype == DType::kFloat8E4M3;
  (bytes ? feature_counts_kernel<uint16_t> : feature_counts_kernel<uint32_t>)<<<grid, kThreads, 0, stream>>>(
      args, args.pattern());
  check_launch("feature_counts");
}

}  // namespace sparse24::cuda
