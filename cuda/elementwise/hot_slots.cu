// Which row of y_hot and dh_hot a feature has, for the epilogues of linear_gradient and linear_gradient_fp8;
// rows that no feature has are NaN.
#include <cuda_runtime.h>

#include "common/launch.cuh"
#include "elementwise/hot_slots.h"

namespace sparse24::cuda {
namespace {

constexpr int kThreads = 128;

// A block owns a row of `ld` elements: it is a feature's if its index is above all before it. `slots` is -1 everywhere
// before.
template <class Element, class Args>
__global__ void __launch_bounds__(kThreads) hot_slots_kernel(const Args args, int64_t ld, Element nan) {
  const int64_t slot = blockIdx.x, feature = args.hot[slot];
  bool bad = feature < 0 || feature >= args.features;
  for (int64_t i = threadIdx.x; i < slot; i += kThreads) bad |= args.hot[i] >= feature;
  if (!__syncthreads_or(bad)) {
    if (threadIdx.x == 0) args.hot_slots[feature] = int32_t(slot);
    return;
  }
  for (void* hot : {args.y_hot, args.dh_hot}) {
    auto* row = static_cast<Element*>(hot) + slot * ld;
    for (int64_t t = threadIdx.x; t < args.tokens; t += kThreads) row[t] = nan;
  }
}

template <class Element, class Args>
void run(const Args& args, int64_t ld, Element nan, cudaStream_t stream) {
  check_cuda(cudaMemsetAsync(args.hot_slots, 0xff, args.features * sizeof(int32_t), stream), "cudaMemsetAsync");
  hot_slots_kernel<<<unsigned(args.hot_count), kThreads, 0, stream>>>(args, ld, nan);
  check_launch("hot_slots");
}

}  // namespace

void hot_slots(const LinearGradientArgs& args, cudaStream_t stream) {
  run(args, args.tokens, uint16_t{0x7fff}, stream);
}
void hot_slots(const LinearGradientFp8Args& args, cudaStream_t stream) {
  run(args, args.ld_hot(), uint8_t{0x7f}, stream);
}

}  // namespace sparse24::cuda
