// The second product of relu2_mlp_dense.
#include <cutlass/numeric_types.h>

#include "few_tokens/dense_products.h"
#include "few_tokens/launch_dense.cuh"

namespace sparse24::cuda {

namespace {

// So many tiles that all multiprocessors have one, and few enough that y is not read too often.
constexpr int kSlices = 4;

}  // namespace

DenseWalk walk_of(const LinearOutArgs& args) { return dense_walk(args.out, args.in * size_of(args.dtype), kSlices); }

int64_t dense_sum_bytes(const LinearOutArgs& args) {
  const DenseWalk walk = walk_of(args);
  const int64_t tokens = args.tokens <= 16 ? 16 : args.tokens <= 32 ? 32 : args.tokens <= 64 ? 64 : 128;
  return int64_t{walk.units()} * walk.warpgroups() * 64 * tokens * int64_t{sizeof(float)};
}

void dense_sum(const LinearOutArgs& args, float* sums, unsigned* counters, cudaStream_t stream) {
  const int64_t row_bytes = args.in * size_of(args.dtype);
  DenseLaunch<DenseSumParams> launch{};
  launch.walk = walk_of(args);
  launch.tokens = int(args.tokens);
  launch.dependent = true;
  launch.params = {{args.scale_w, args.scale_w_per_row, args.bias, args.bias_dtype == DType::kFloat32, args.scale_y,
                    args.scale_y_per_row},
                   args.d,
                   args.d_dtype == DType::kFloat16,
                   sums,
                   counters};
  if (args.dtype == DType::kFloat8E4M3) {
    launch_dense<cutlass::float_e4m3_t, DenseSum>("dense_sum", launch, args.w, args.y, row_bytes, stream);
  } else if (args.dtype == DType::kBFloat16) {
    launch_dense<cutlass::bfloat16_t, DenseSum>("dense_sum", launch, args.w, args.y, row_bytes, stream);
  } else {
    launch_dense<cutlass::half_t, DenseSum>("dense_sum", launch, args.w, args.y, row_bytes, stream);
  }
}

}  // namespace sparse24::cuda
