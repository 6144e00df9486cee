// The second product of relu2_mlp_dense.
#include <cutlass/numeric_types.h>

#include "few_tokens/dense_products.h"
#include "few_tokens/launch_dense.cuh"

namespace sparse24::cuda {
void dense_sum(const LinearOutArgs& args, cudaStream_t stream) {
  const int64_t row_bytes = args.in * size_of(args.dtype);
  DenseLaunch<DenseSumParams> launch{};
  using Tile = DenseTile<cutlass::bfloat16_t, 16>;
  launch.walk = dense_walk(args.out, row_bytes, kSumSlices,
                           clusters_at_a_time<dense_few_kernel<Tile, DenseSum<Tile>>, Tile::kMaxThreads, kSumSlices>());
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
