// linear_gradient with a 2:4 weight: in one kernel where groups of features and of tokens are whole; elsewhere mm
// multiplies it, and a kernel that reads dy does what stands in the epilogue of linear_gradient, by the same code.
#include "common/dispatch.cuh"
#include "common/launch.cuh"
#include "elementwise/hot_slots.h"
#include "gemm/sm90/epilogues/gradient_transposed.cuh"
#include "gemm/sm90/ops/linear_gradient_packed.cuh"
#include "sparse24/error.h"
#include "sparse24/mm.h"
#include "sparse24/packed.h"

namespace sparse24::cuda {
namespace {

constexpr int kTileM = 4 * kTileGroups, kTileN = 64;  // tokens and features of a CTA of one warpgroup

// CTAs of a multiprocessor, which is bound by their loads: as many as registers suffice for.
template <class T>
constexpr int kCtas = 5;
template <>
constexpr int kCtas<__half> = 4;

template <class T, bool kFp8Meta, bool kCounts>
__global__ void __launch_bounds__(128, kCtas<T>)
    differentiate(__grid_constant__ const GradientParams<T> p, const T* dy) {
  const GradientEpilogue<T, kFp8Meta, kCounts, kTileM, kTileN> epilogue(p);
  epilogue.visit_stored(dy, blockIdx.y, blockIdx.x, threadIdx.x);
}

template <class T>
GradientParams<T> params_of(const LinearGradientArgs& args) {
  return {int(args.tokens),
          int(args.features),
          args.y,
          args.meta,
          args.dh,
          {{args.y_tokens.values, args.y_tokens.meta}, {args.dh_tokens.values, args.dh_tokens.meta}},
          args.counts,
          int(args.quarter()),
          args.roots,
          args.hot_count > 0 ? args.hot_slots : nullptr,
          {args.y_hot, args.dh_hot}};
}

template <class T, bool kFp8Meta, bool kCounts>
void launch(const LinearGradientArgs& args, const void* dy, cudaStream_t stream) {
  const GradientParams<T> params = params_of<T>(args);
  const int64_t columns = round_up(args.features, kMetaRowPadding);  // metadata has its padding
  const dim3 grid(unsigned(columns / kTileN), unsigned(ceil_div(args.tokens, kTileM)));
  differentiate<T, kFp8Meta, kCounts><<<grid, 128, 0, stream>>>(params, static_cast<const T*>(dy));
  check_launch("sparse24.linear_gradient_packed: launch");
}

template <class T>
void launch_fused(const LinearGradientPackedArgs& args, cudaStream_t stream) {
  constexpr DType kDType = std::is_same_v<T, __half> ? DType::kFloat16 : DType::kBFloat16;
  using Epilogue = TransposedGradientEpilogue<T, kGradientPackedM, kGradientPackedN>;
  const LinearGradientArgs& g = args.gradient;
  GradientPackedSm90<kDType, Epilogue>::launch(g, args.w_meta, params_of<T>(g), grouped_config(g.dtype), stream,
                                               "sparse24.linear_gradient_packed: launch");
}

template <class T>
void launch_for(const LinearGradientArgs& args, const void* dy, cudaStream_t stream) {
  const bool fp8_meta = args.meta_dtype == DType::kFloat8E4M3, counts = args.counts != nullptr;
  if (fp8_meta) return counts ? launch<T, true, true>(args, dy, stream) : launch<T, true, false>(args, dy, stream);
  counts ? launch<T, false, true>(args, dy, stream) : launch<T, false, false>(args, dy, stream);
}

}  // namespace

void linear_gradient_packed(const LinearGradientPackedArgs& args, cudaStream_t stream) {
  const LinearGradientArgs& g = args.gradient;
  if (g.tokens == 0 || g.features == 0) return;
  check(g.in > 0, "sparse24.linear_gradient_packed: expected K (columns of grad) to be above 0, got 0");
  check(!g.roots || g.dtype == DType::kFloat16, "sparse24.linear_gradient_packed: expected roots in float16, got ",
        name_of(g.dtype));
  if (g.hot_count > 0) hot_slots(g, stream);
  if (linear_gradient_packed_is_fused(g))
    return dispatch_16bit(g.dtype, [&](auto t) { launch_fused<decltype(t)>(args, stream); });
  // dy.T = w.T @ grad.T
  mm({Operand::of(g.features, g.in, g.dtype, Dim::kFeatures), g.tokens, g.w, args.w_meta, g.grad, Major::kColumn,
      g.ld_grad, args.dy, g.hidden_dtype, Major::kColumn},
     stream);
  dispatch_16bit(g.dtype, [&](auto t) { launch_for<decltype(t)>(g, args.dy, stream); });
}

}  // namespace sparse24::cuda
