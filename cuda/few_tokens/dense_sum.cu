// The second product of relu2_mlp_dense.
#include <cutlass/numeric_types.h>

#include "few_tokens/dense_products.h"
#include "few_tokens/launch_dense.cuh"

namespace sparse24::cuda {
namespace {

// Rows of a weight from which two slices of K are enough for tiles on most multiprocessors. With four a weight of fewer
// rows has tiles that are not too narrow, and y is read half as often.
constexpr int64_t kRowsOfTwoSlices = 3072;

template <int kSlices>
struct In {
  template <class Tile>
  using Sink = DenseSum<Tile, kSlices>;
};

template <int kSlices>
void launch_slices(const LinearOutArgs& args, DenseLaunch<DenseSumParams>& launch, cudaStream_t stream) {
  using Tile = DenseTile<cutlass::bfloat16_t, 16>;
  constexpr auto kernel = dense_few_kernel<Tile, DenseSum<Tile, kSlices>>;
  const int64_t row_bytes = args.in * size_of(args.dtype);
  launch.walk = dense_walk(args.out, row_bytes, kSlices, clusters_at_a_time<kernel, Tile::kMaxThreads, kSlices>());
  const auto of = [&](auto element) {
    launch_dense<decltype(element), In<kSlices>::template Sink>("dense_sum", launch, args.w, args.y, row_bytes, stream);
  };
  if (args.dtype == DType::kFloat8E4M3) return of(cutlass::float_e4m3_t{});
  if (args.dtype == DType::kBFloat16) return of(cutlass::bfloat16_t{});
  of(cutlass::half_t{});
}

}  // namespace

void dense_sum(const LinearOutArgs& args, cudaStream_t stream) {
  DenseLaunch<DenseSumParams> launch{};
  launch.tokens = int(args.tokens);
  launch.dependent = true;
  launch.params = {{args.scale_w, args.scale_w_per_row, args.bias, args.bias_dtype == DType::kFloat32, args.scale_y,
                    args.scale_y_per_row},
                   args.d,
                   args.d_dtype == DType::kFloat16};
  if (args.out >= kRowsOfTwoSlices) {
    launch_slices<2>(args, launch, stream);
  } else {
    launch_slices<4>(args, launch, stream);
  }
}

}  // namespace sparse24::cuda
