// densest_features by one thread block: a radix selection of the smallest count that belongs, then an ordered
// compaction of the features. Apart from the kernel, so that a host can run it.
#pragma once

#include <cstdint>

namespace sparse24::cuda {

inline constexpr int kDensestThreads = 1024, kDensestWarps = kDensestThreads / 32;
inline constexpr int kDigitBits = 10;  // a bucket for each thread: counts below 2^20 take two digits
static_assert(1 << kDigitBits == kDensestThreads && kDensestWarps == 32);

struct DensestShared {
  int buckets[kDensestThreads];
  unsigned varying[kDensestWarps];
  unsigned sums[kDensestWarps];
  unsigned digit;
  int needed;
};

// Keys compare as the signed counts do.
__device__ __forceinline__ unsigned key_of(int32_t count) { return static_cast<unsigned>(count) ^ 0x80000000u; }

struct Threshold {
  unsigned key;  // the k-th largest
  int needed;    // how many of the features with this key are among the k: the first ones
};

// The keys of features first, first + kStride, ...: all loads are on their way before one is waited for, where a loop
// with an exit after each would wait for each; more of them would be more code, which one short block waits for too.
// `none` stands for features that do not exist: those from `left` on.
inline constexpr int kLoads = 8;
template <int kStride>
__device__ __forceinline__ int load_keys(const int32_t* __restrict__ counts, unsigned features, unsigned first,
                                         unsigned none, unsigned (&keys)[kLoads]) {
  const int left = static_cast<int>(features - first);
  const int32_t* __restrict__ from = counts + first;
#pragma unroll
  for (int i = 0; i < kLoads; ++i) keys[i] = kStride * i < left ? key_of(from[kStride * i]) : none;
  return left;
}

// The sum of v over the threads before this one. All threads call it.
__device__ __forceinline__ unsigned sum_before(unsigned v, unsigned (&sums)[kDensestWarps], unsigned& total) {
  constexpr unsigned kAll = 0xffffffffu;
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  unsigned sum = v;
#pragma unroll
  for (unsigned distance = 1; distance < 32; distance *= 2) {
    const unsigned other = __shfl_up_sync(kAll, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  const unsigned of_warp = sums[lane];
  total = __reduce_add_sync(kAll, of_warp);
  const unsigned before = __reduce_add_sync(kAll, lane < warp ? of_warp : 0u) + sum - v;
  __syncthreads();  // the next call writes sums
  return before;
}

// From the first bit on in which counts differ, digit by digit: a histogram of the keys that agree with the threshold
// so far tells its next digit, and how many keys are above.
__device__ __forceinline__ Threshold find_threshold(const int32_t* __restrict__ counts, unsigned features, int k,
                                                    DensestShared& shared) {
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = key_of(counts[0]);
  unsigned varying = 0;
  unsigned keys[kLoads];
  for (unsigned batch = 0; batch < features; batch += kLoads * kDensestThreads) {
    load_keys<kDensestThreads>(counts, features, batch + threadIdx.x, first, keys);
#pragma unroll
    for (unsigned key : keys) varying |= key ^ first;
  }
  varying = __reduce_or_sync(0xffffffffu, varying);
  if (lane == 0) shared.varying[warp] = varying;
  shared.buckets[threadIdx.x] = 0;
  __syncthreads();
  varying = __reduce_or_sync(0xffffffffu, shared.varying[lane]);

  unsigned open = varying == 0 ? 0 : 0xffffffffu >> __clz(static_cast<int>(varying));  // bits yet unknown, zero in key
  Threshold threshold{first & ~open, k};
  while (open != 0) {
    const int bits = 32 - __clz(static_cast<int>(open)), low = bits > kDigitBits ? bits - kDigitBits : 0;
    for (unsigned batch = 0; batch < features; batch += kLoads * kDensestThreads) {
      const int left = load_keys<kDensestThreads>(counts, features, batch + threadIdx.x, 0, keys);
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const bool agrees = kDensestThreads * i < left && ((keys[i] ^ threshold.key) & ~open) == 0;
        if (agrees) atomicAdd(&shared.buckets[(keys[i] & open) >> low], 1);
      }
    }
    __syncthreads();
    const unsigned digit = kDensestThreads - 1 - threadIdx.x;  // the largest one comes first
    const int here = shared.buckets[digit];
    shared.buckets[digit] = 0;
    unsigned total;
    const int above = static_cast<int>(sum_before(static_cast<unsigned>(here), shared.sums, total));
    if (above < threshold.needed && threshold.needed <= above + here) {  // of one thread
      shared.digit = digit;
      shared.needed = threshold.needed - above;
    }
    __syncthreads();
    threshold.key |= shared.digit << low;
    threshold.needed = shared.needed;
    open = (1u << low) - 1;
  }
  return threshold;
}

// Each warp fetches 32 words of 32 features, neighbours by neighbours, and lane w keeps word w, as one bit for each
// feature: so a thread owns consecutive features, and threads own them in order.
__device__ __forceinline__ void write_features(const int32_t* __restrict__ counts, unsigned features,
                                               Threshold threshold, int64_t* __restrict__ out, DensestShared& shared) {
  constexpr unsigned kAll = 0xffffffffu, kTile = 32 * kDensestThreads;
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int above_before = 0, equal_before = 0;  // in the tiles before
  for (unsigned tile = 0; tile < features; tile += kTile) {
    unsigned above = 0, equal = 0;
#pragma unroll 1
    for (int words = 0; words < 32; words += kLoads) {
      unsigned keys[kLoads];  // 0 is above nothing
      const int left = load_keys<32>(counts, features, tile + 1024 * warp + 32 * words + lane, 0, keys);
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const unsigned above_bits = __ballot_sync(kAll, keys[i] > threshold.key);
        const unsigned equal_bits = __ballot_sync(kAll, keys[i] == threshold.key && 32 * i < left);
        if (static_cast<int>(lane) - words == i) above = above_bits, equal = equal_bits;
      }
    }
    // One scan for both: a tile has at most 2^15 of either.
    unsigned total;
    const unsigned both = static_cast<unsigned>(__popc(above)) | static_cast<unsigned>(__popc(equal)) << 16;
    const unsigned before = sum_before(both, shared.sums, total);
    const int equals = equal_before + static_cast<int>(before >> 16);
    int at = above_before + static_cast<int>(before & 0xffff);
    at += equals < threshold.needed ? equals : threshold.needed;
    int room = threshold.needed - equals;  // for equals, from this thread on
    const int64_t base = int64_t{tile} + 32 * threadIdx.x;
    for (unsigned left = room > 0 ? above | equal : above; left != 0; left &= left - 1) {
      const int bit = __ffs(static_cast<int>(left)) - 1;
      if ((equal >> bit & 1) != 0 && --room < 0) continue;
      out[at++] = base + bit;
    }
    above_before += static_cast<int>(total & 0xffff);
    equal_before += static_cast<int>(total >> 16);
  }
}

}  // namespace sparse24::cuda
