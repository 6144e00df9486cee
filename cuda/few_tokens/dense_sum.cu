// The second product of relu2_mlp_dense.
#include <cutlass/numeric_types.h>

#include "few_tokens/dense_products.h"
#include "few_tokens/launch_dense.cuh"

namespace sparse24::cuda {
namespace {

// How many clusters run at a time: the multiprocessors of a device come in groups, which no cluster leaves.
int clusters_at_a_time() {
  static std::atomic<int> known[64];
  std::atomic<int>& of_device = known[current_device() & 63];
  int clusters = of_device.load(std::memory_order_relaxed);
  if (clusters != 0) return clusters;
  using Tile = DenseTile<cutlass::bfloat16_t, 16>;
  constexpr auto kernel = dense_few_kernel<Tile, DenseSum<Tile>>;
  allow_shared_memory<kernel>(kMaxSharedBytes);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {kSumSlices, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = kSumSlices;
  config.blockDim = Tile::kMaxThreads;
  config.dynamicSmemBytes = kMaxSharedBytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check_cuda(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), "cudaOccupancyMaxActiveClusters");
  of_device.store(clusters = std::max(clusters, 1), std::memory_order_relaxed);
  return clusters;
}

}  // namespace

void dense_sum(const LinearOutArgs& args, cudaStream_t stream) {
  const int64_t row_bytes = args.in * size_of(args.dtype);
  DenseLaunch<DenseSumParams> launch{};
  launch.walk = dense_walk(args.out, row_bytes, kSumSlices, clusters_at_a_time());
  launch.tokens = int(args.tokens);
  launch.dependent = true;
  launch.params = {{args.scale_w, args.scale_w_per_row, args.bias, args.bias_dtype == DType::kFloat32, args.scale_y,
                    args.scale_y_per_row},
                   args.d,
                   args.d_dtype == DType::kFloat16};
  static_assert(kSumSlices > 1);  // so that a block has one unit
  if (args.dtype == DType::kFloat8E4M3) {
    launch_dense<cutlass::float_e4m3_t, DenseSum>("dense_sum", launch, args.w, args.y, row_bytes, stream);
  } else if (args.dtype == DType::kBFloat16) {
    launch_dense<cutlass::bfloat16_t, DenseSum>("dense_sum", launch, args.w, args.y, row_bytes, stream);
  } else {
    launch_dense<cutlass::half_t, DenseSum>("dense_sum", launch, args.w, args.y, row_bytes, stream);
  }
}

}  // namespace sparse24::cuda
