// The first product of relu2_mlp_dense.
#include <cutlass/numeric_types.h>

#include "common/dispatch.cuh"
#include "few_tokens/dense_products.h"
#include "few_tokens/dense_wide.cuh"
#include "few_tokens/launch_dense.cuh"

namespace sparse24::cuda {
namespace {

template <class T>
struct Of {
  template <class Tile>
  using Sink = std::conditional_t<Tile::kOfTokens, WideRelu2<Tile, T>, DenseRelu2<Tile, T>>;
};

}  // namespace

void dense_relu2(const LinearRelu2Args& args, cudaStream_t stream) {
  const LinearArgs& linear = args.linear;
  const int64_t row_bytes = linear.in * size_of(linear.dtype);
  DenseLaunch<DenseRelu2Params> launch{};
  launch.walk = dense_walk(linear.out, row_bytes, 1, device_info().sm_count);
  launch.tokens = int(linear.tokens);
  launch.dependent = linear.dtype == DType::kFloat8E4M3;  // behind the kernel that quantises x
  launch.params = {{linear.scale_w, linear.scale_w_per_row, linear.bias, false, linear.scale_y, linear.scale_y_per_row},
                   linear.scale_x,
                   linear.scale_x_per_row,
                   linear.activation.threshold,
                   args.y};
  if (linear.dtype == DType::kFloat8E4M3) {
    return launch_dense<cutlass::float_e4m3_t, Of<__nv_bfloat16>::Sink>("dense_relu2", launch, linear.w, linear.x,
                                                                        row_bytes, stream);
  }
  if (linear.dtype == DType::kBFloat16) {
    return launch_dense<cutlass::bfloat16_t, Of<__nv_bfloat16>::Sink>("dense_relu2", launch, linear.w, linear.x,
                                                                      row_bytes, stream);
  }
  launch_dense<cutlass::half_t, Of<__half>::Sink>("dense_relu2", launch, linear.w, linear.x, row_bytes, stream);
}

}  // namespace sparse24::cuda
