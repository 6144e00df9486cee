// gather_features: columns of the dense matrix, from the 2:4 operand. It moves elements and never looks at them.
#include <cuda_runtime.h>

#include "common/launch.cuh"
#include "sparse24/gather_features.h"

namespace sparse24::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 16;  // rows whose metadata of 64 or 128 columns is a block of 128 or 256 bytes (format.h)

// A thread fetches one feature of 16 rows. Its neighbours have the next features, so that stores are contiguous. All
// loads of a kind are on their way before one is waited for; rows beyond the last read the padding of the metadata and
// keep nothing.
template <class T>
__global__ void __launch_bounds__(kThreads)
    gather_features_kernel(Operand a, Operand pattern, const T* __restrict__ values, const uint8_t* __restrict__ meta,
                           const int64_t* __restrict__ features, int64_t count, unsigned column_blocks, T nan,
                           T* __restrict__ out) {
  const int64_t h = int64_t{blockIdx.x % column_blocks} * kThreads + threadIdx.x;
  if (h >= count) return;
  const int64_t row0 = int64_t{blockIdx.x / column_blocks} * kRows, feature = features[h];
  const bool exists = feature >= 0 && feature < a.k;
  const int64_t g = exists ? feature / 4 : 0;
  const uint32_t place = feature % 4;
  const int rows = int(min(int64_t{kRows}, a.m - row0));

  uint32_t nibbles[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    // Where there are no columns there is no metadata.
    nibbles[r] = exists ? meta[pattern.meta_byte(row0 + r, g)] >> Operand::meta_shift(g) & 0xf : 0;
  }
  T got[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const bool first = place == (nibbles[r] & 3), second = place == nibbles[r] >> 2;
    const bool kept = exists && r < rows && (first || second);
    got[r] = kept ? values[a.value_index(row0 + r, 2 * g + !first)] : exists ? T{0} : nan;
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r < rows) out[(row0 + r) * count + h] = got[r];
  }
}

template <class T>
void launch(const GatherFeaturesArgs& args, T nan, cudaStream_t stream) {
  const int64_t column_blocks = ceil_div(args.count, kThreads);
  gather_features_kernel<T><<<unsigned(column_blocks * ceil_div(args.a.m, kRows)), kThreads, 0, stream>>>(
      args.a, args.pattern(), static_cast<const T*>(args.values), args.meta, args.features, args.count,
      unsigned(column_blocks), nan, static_cast<T*>(args.out));
  check_launch("gather_features");
}

}  // namespace

void gather_features(const GatherFeaturesArgs& args, cudaStream_t stream) {
  if (args.a.m == 0 || args.count == 0) return;
  if (args.a.dtype == DType::kFloat8E4M3) return launch<uint8_t>(args, 0x7f, stream);
  launch<uint16_t>(args, 0x7fff, stream);
}

}  // namespace sparse24::cuda
