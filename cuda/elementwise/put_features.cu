// put_features: parts are summed and put where they belong, in one pass.
#include <cuda_runtime.h>

#include "common/dispatch.cuh"
#include "common/launch.cuh"
#include "common/packed.cuh"
#include "sparse24/put_features.h"

namespace sparse24::cuda {
namespace {

constexpr int kThreads = 128;

// A thread sums kWidth neighbours of a row of the parts: 16 bytes of rows that are aligned, else one element. Where
// features are columns it sums one element too, so that neighbours are stored together: with eight a thread it takes
// twice as long.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) put_features_kernel(const PutFeaturesArgs args) {
  const int64_t width = args.parts_columns(), part = args.parts_rows() * width;
  const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kWidth;
  if (i >= part) return;
  const int64_t row = i / width, column = i % width;
  const T* parts = static_cast<const T*>(args.parts) + i;
  float sum[kWidth] = {};
  for (int64_t p = 0; p < args.part_count; ++p) {
    if constexpr (kWidth == 8) {
      const Vec8 v = load16(parts + p * part);
#pragma unroll
      for (int c = 0; c < kWidth; ++c) sum[c] += to_float(T{}, v[c]);
    } else {
      sum[0] += float(parts[p * part]);
    }
  }
  T* out = static_cast<T*>(args.out);
  const int64_t feature = args.features[args.by_columns ? column : row];
  if (feature < 0 || feature >= args.limit()) return;
  T* to = out + (args.by_columns ? row * args.columns + feature : feature * args.columns + column);
  if constexpr (kWidth == 8) {
    store16(to, pack2(T{}, sum[0], sum[1]), pack2(T{}, sum[2], sum[3]), pack2(T{}, sum[4], sum[5]),
            pack2(T{}, sum[6], sum[7]));
  } else {
    *to = T(sum[0]);
  }
}

template <class T>
void launch(const PutFeaturesArgs& args, cudaStream_t stream) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool wide = !args.by_columns && args.columns % 8 == 0 && aligned(args.parts) && aligned(args.out);
  const int64_t threads = args.parts_rows() * args.parts_columns() / (wide ? 8 : 1);
  (wide ? put_features_kernel<T, 8>
        : put_features_kernel<T, 1>)<<<unsigned(ceil_div(threads, kThreads)), kThreads, 0, stream>>>(args);
  check_launch("put_features");
}

}  // namespace

void put_features(const PutFeaturesArgs& args, cudaStream_t stream) {
  if (args.parts_rows() == 0 || args.parts_columns() == 0) return;
  dispatch_16bit(args.dtype, [&](auto t) { launch<decltype(t)>(args, stream); });
}

}  // namespace sparse24::cuda
