// gather_features: columns of the dense matrix, from the 2:4 operand. It moves elements and never looks at them.
#include <cuda_runtime.h>

#include "launch.cuh"
#include "sparse24/gather_features.h"

namespace sparse24::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 16;  // rows whose metadata of 64 or 128 columns is a block of 128 or 256 bytes (format.h)

// A thread fetches one feature of 16 rows; its neighbours have the next features, so that stores are contiguous.
template <class T>
__global__ void __launch_bounds__(kThreads)
    gather_features_kernel(Operand a, Operand pattern, const T* values, const uint8_t* meta, const int64_t* features,
                           int64_t count, T nan, T* out) {
  const int64_t h = int64_t{blockIdx.y} * kThreads + threadIdx.x;
  if (h >= count) return;
  const int64_t row0 = int64_t{blockIdx.x} * kRows, feature = features[h], g = feature / 4;
  const bool exists = feature >= 0 && feature < a.k;
  const uint32_t place = feature % 4;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = row0 + r;
    if (row >= a.m) return;
    T got = nan;
    if (exists) {
      const uint32_t nibble = meta[pattern.meta_byte(row, g)] >> Operand::meta_shift(g) & 0xf;
      const bool first = place == (nibble & 3), second = place == nibble >> 2;
      got = first || second ? values[a.value_index(row, 2 * g + second)] : T{0};
    }
    out[row * count + h] = got;
  }
}

template <class T>
void launch(const GatherFeaturesArgs& args, T nan, cudaStream_t stream) {
  const dim3 grid(unsigned(ceil_div(args.a.m, kRows)), unsigned(ceil_div(args.count, kThreads)));
  gather_features_kernel<T><<<grid, kThreads, 0, stream>>>(args.a, args.pattern(), static_cast<const T*>(args.values),
                                                           args.meta, args.features, args.count, nan,
                                                           static_cast<T*>(args.out));
  check_launch("gather_features");
}

}  // namespace

void gather_features(const GatherFeaturesArgs& args, cudaStream_t stream) {
  if (args.a.m == 0 || args.count == 0) return;
  if (args.a.dtype == DType::kFloat8E4M3) return launch<uint8_t>(args, 0x7f, stream);
  launch<uint16_t>(args, 0x7fff, stream);
}

}  // namespace sparse24::cuda
