// linear_gradient_fp8 with a 2:4 weight: in one kernel where groups of tokens are whole; elsewhere mm multiplies it,
// and a kernel that reads dy does what stands in the epilogue of linear_gradient_fp8, by the same code.
#include "common/launch.cuh"
#include "elementwise/hot_slots.h"
#include "gemm/sm90/epilogues/gradient_transposed_fp8.cuh"
#include "gemm/sm90/ops/linear_gradient_packed.cuh"
#include "sparse24/error.h"
#include "sparse24/mm.h"

namespace sparse24::cuda {
namespace {

constexpr int kTileM = 4 * kTileGroups, kTileN = TradedPart::kColumns;  // tokens and features of a CTA of one warpgroup
constexpr int kCtas = 5;  // of a multiprocessor, which is bound by their loads: as many as registers suffice for

__global__ void __launch_bounds__(128, kCtas)
    differentiate(__grid_constant__ const GradientFp8Params p, const __nv_bfloat16* dy) {
  const GradientFp8Epilogue<kTileM, kTileN> epilogue(p);
  epilogue.visit_stored(dy, blockIdx.y, blockIdx.x, threadIdx.x);
}

}  // namespace

void linear_gradient_fp8_packed(const LinearGradientFp8PackedArgs& args, cudaStream_t stream) {
  const LinearGradientFp8Args& g = args.gradient;
  if (g.tokens == 0 || g.features == 0) return;
  check(g.in > 0, "sparse24.linear_gradient_fp8_packed: expected K (columns of grad) to be above 0, got 0");
  if (g.hot_count > 0) hot_slots(g, stream);
  constexpr DType kFp8 = DType::kFloat8E4M3;
  if (linear_gradient_fp8_packed_is_fused(g)) {
    using Epilogue = TransposedGradientFp8Epilogue<kGradientPackedM, kGradientPackedN>;
    return GradientPackedSm90<kFp8, Epilogue>::launch(g, args.w_meta, GradientFp8Params::of(g), grouped_config(kFp8),
                                                      stream, "sparse24.linear_gradient_fp8_packed: launch");
  }
  // dy.T = w @ grad.T
  mm({Operand::of(g.features, g.in, kFp8, Dim::kFeatures), g.tokens, g.w, args.w_meta, g.grad, Major::kColumn,
      g.ld_grad, args.dy, DType::kBFloat16, Major::kColumn},
     stream);
  const int64_t columns = round_up(g.features, kMetaRowPadding);  // metadata has its padding
  const dim3 grid(unsigned(columns / kTileN), unsigned(ceil_div(g.tokens, kTileM)));
  differentiate<<<grid, 128, 0, stream>>>(GradientFp8Params::of(g), static_cast<const __nv_bfloat16*>(args.dy));
  check_launch("sparse24.linear_gradient_fp8_packed: launch");
}

}  // namespace sparse24::cuda
