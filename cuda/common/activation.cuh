// The activations, from 16-bit pre-activations or their accumulators.
#pragma once

#include <type_traits>

#include "common/packed.cuh"
#include "sparse24/types.h"

namespace sparse24::cuda {

// Whether kernels of T can store and be given an activation's root, relu(h), instead of its square: float16, whose
// squares underflow. Kernels of other types have no code for it.
template <class T>
inline constexpr bool kHasRoots = std::is_same_v<T, __half>;

#ifdef __CUDACC__  // inline PTX; tests/cpp/emulator/ptx.h has it for hosts
// max(x, 0) that propagates NaN, as torch.relu does (fmaxf would drop it).
__device__ __forceinline__ float relu(float x) {
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
}
// The same of a pair, rounded as by pack2, in one instruction. Never a negative zero.
__device__ __forceinline__ uint32_t pack2_relu(__nv_bfloat16, float lo, float hi) {
  uint32_t pair;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
  return pair;
}
__device__ __forceinline__ uint32_t pack2_relu(__half, float lo, float hi) {
  uint32_t pair;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
  return pair;
}
#endif

// The activation in fp32, from the 16-bit pre-activation.
template <Activation kAct>
__device__ __forceinline__ float activate(float x) {
  if constexpr (kAct == Activation::kNone) return x;
  const float y = relu(x);
  return kAct == Activation::kRelu2 ? __fmul_rn(y, y) : y;
}

// Largest |activated| of 8 elements and `so_far`, both lanes of a pair apart; NaN does not count.
template <class T, Activation kAct>
__device__ __forceinline__ typename Pair<T>::type amax8(typename Pair<T>::type so_far, const Vec8& v) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    auto x = reinterpret_cast<const typename Pair<T>::type&>(v.w[i]);
    if constexpr (kAct == Activation::kNone) x = __habs2(x);
    so_far = __hmax2(so_far, x);
  }
  return so_far;
}

// Both lanes of such a running maximum to the activated fp32 value: activations grow with x, so it is enough to
// activate the maximum.
template <Activation kAct, class P>
__device__ __forceinline__ float activated_amax(P m) {
  const float x = fmaxf(0.f, fmaxf(float(m.x), float(m.y)));
  return kAct == Activation::kRelu2 ? __fmul_rn(x, x) : x;
}

}  // namespace sparse24::cuda
