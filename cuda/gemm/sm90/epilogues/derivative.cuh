// The derivative of the squared ReLU from its value: y = relu(h)^2 has the derivative 2 h = 2 sqrt(y).
#pragma once

#include <cmath>

#include "common/activation.cuh"
#include "common/float8.cuh"
#include "common/packed.cuh"

namespace sparse24::cuda {

#ifdef __CUDACC__  // inline PTX; tests/cpp/emulator/ptx.h has it for hosts
__device__ __forceinline__ float approximate_inverse_root(float x) {
  float inverse;
  asm volatile("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
}
// The smaller one; NaN if one of them is.
__device__ __forceinline__ float min_or_nan(float x, float y) {
  float smaller;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(smaller) : "f"(x), "f"(y));
  return smaller;
}
// Keeps what uses v behind all that is volatile before.
__device__ __forceinline__ void hold(float& v) { asm volatile("" : "+f"(v)); }
#endif

// Computes twice the square roots of numbers T, of 16 bits or float8, rounded to nearest: it is __fsqrt_rn without the
// branches, which zeros would take, and in step, so that no number waits for another. With `roots` x holds the roots
// already; that is chosen at the end, because a branch would take registers.
template <class T, int kCount>
__device__ __forceinline__ void twice_roots(float (&x)[kCount], bool roots) {
  // Codes of float8 have no infinity.
  constexpr bool kInfinite = !std::is_same_v<T, __nv_fp8_e4m3>;
  // The sequence needs a normal number as its correction, so that tiny ones are scaled; of 16 and 8 bits bfloat16 alone
  // has some. These are factors and not choices, because a choice would hold one of seven predicates from the first
  // step to the last.
  constexpr bool kTiny = std::is_same_v<T, __nv_bfloat16>;
  float scaled[kCount], inverse[kCount], unscale[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const bool tiny = kTiny && x[i] < 0x1p-100f;
    scaled[i] = kTiny ? __fmul_rn(x[i], tiny ? 0x1p64f : 1.f) : x[i];
    unscale[i] = tiny ? 0x1p-32f : 1.f;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) inverse[i] = approximate_inverse_root(scaled[i]);
#pragma unroll
  for (int i = 0; i < kCount; ++i) hold(inverse[i]);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    // Of zero a number, so that what follows makes the same zero of it: without infinities it needs no choice.
    if constexpr (!kInfinite) inverse[i] = min_or_nan(fabsf(inverse[i]), 0x1p64f);
    const float root = __fmul_rn(scaled[i], inverse[i]);
    const float corrected = __fmaf_rn(__fmaf_rn(-root, root, scaled[i]), inverse[i], __fadd_rn(root, root));
    const bool itself = kInfinite && (x[i] == 0.f || x[i] == INFINITY);
    const float twice = itself ? x[i] : kTiny ? __fmul_rn(corrected, unscale[i]) : corrected;
    x[i] = kHasRoots<T> && roots ? __fadd_rn(x[i], x[i]) : twice;
  }
}

// The part of a kernel's parameters that says whether it is given roots. Types that never are have no room for it.
template <class T>
struct MaybeRoots {
  MaybeRoots(bool = false) {}
  __device__ __forceinline__ bool roots() const { return false; }
};
template <>
struct MaybeRoots<__half> {
  bool given;
  MaybeRoots(bool roots = false) : given(roots) {}
  __device__ __forceinline__ bool roots() const { return given; }
};

// The derivative of the activation from what the forward pass stored of it: of T, y or its roots.
template <class T>
struct StoredDerivative : MaybeRoots<T> {
  using MaybeRoots<T>::MaybeRoots;

  // Turns pairs of dy, the gradient of y, into dy * 2 sqrt(y), that of h, which is rounded once.
  template <int kCount>
  __device__ __forceinline__ void apply(uint32_t (&dy)[kCount], const uint32_t (&stored)[kCount]) const {
    float factors[2 * kCount];
#pragma unroll
    for (int i = 0; i < 2 * kCount; ++i) factors[i] = to_float(T{}, uint16_t(stored[i / 2] >> 16 * (i % 2)));
    twice_roots<T>(factors, this->roots());
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      dy[i] = pack2(T{}, __fmul_rn(to_float(T{}, uint16_t(dy[i])), factors[2 * i]),
                    __fmul_rn(to_float(T{}, uint16_t(dy[i] >> 16)), factors[2 * i + 1]));
    }
  }
};

}  // namespace sparse24::cuda
