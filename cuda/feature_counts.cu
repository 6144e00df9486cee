// feature_counts: non-zeros by feature, in blocks of 16 tokens of the 2:4 operand.
#include <cuda_runtime.h>

#include "launch.cuh"
#include "sparse24/feature_counts.h"

namespace sparse24::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = int(FeatureCountsArgs::kBlock);
constexpr int kBlocks = 4;  // of tokens, of one thread: atomics are what takes time

// A thread counts one group of four features in kBlocks x 16 tokens. Elements are bits: Pair is two of them, and a
// number is zero if nothing but its sign is set. All loads of a kind are on their way before one is waited for; rows
// beyond the last read the padding of the metadata.
template <class Pair>
__global__ void __launch_bounds__(kThreads) feature_counts_kernel(const FeatureCountsArgs args, Operand pattern) {
  constexpr int kBits = 4 * sizeof(Pair);  // of an element
  constexpr uint32_t kMagnitude = (uint32_t{1} << (kBits - 1)) - 1;
  const int64_t g = int64_t{blockIdx.y} * kThreads + threadIdx.x;
  if (4 * g >= args.a.k) return;
  uint32_t counts = 0;  // a byte each
  for (int64_t block = int64_t{blockIdx.x} * kBlocks; block < (int64_t{blockIdx.x} + 1) * kBlocks; ++block) {
    if (block >= args.sampled_blocks()) break;
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
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      counts += uint32_t((pair[r] & kMagnitude) != 0) << 8 * (nibble[r] & 3);
      counts += uint32_t((uint32_t(pair[r]) >> kBits & kMagnitude) != 0) << 8 * (nibble[r] >> 2);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (const int count = int(counts >> 8 * i & 0xff)) atomicAdd(args.counts + 4 * g + i, count);
  }
}

}  // namespace

void feature_counts(const FeatureCountsArgs& args, cudaStream_t stream) {
  if (args.a.m == 0 || args.a.k == 0) return;
  const dim3 grid(unsigned(ceil_div(args.sampled_blocks(), kBlocks)), unsigned(ceil_div(args.a.k / 4, kThreads)));
  const bool bytes = args.a.dtype == DType::kFloat8E4M3;
  (bytes ? feature_counts_kernel<uint16_t> : feature_counts_kernel<uint32_t>)<<<grid, kThreads, 0, stream>>>(
      args, args.pattern());
  check_launch("feature_counts");
}

}  // namespace sparse24::cuda
