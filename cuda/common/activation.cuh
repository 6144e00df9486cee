// The activations on the device. y of a pre-activation h is computed in two parts: its root, 16 bits that order as y
// does, so that two of four are selected among roots; and y of a root. sparse24/activation.h defines both.
#pragma once

#include <type_traits>

#include "common/bits.cuh"
#include "common/float8.cuh"
#include "common/packed.cuh"
#include "sparse24/activation.h"

namespace sparse24::cuda {

// Whether kernels of T can be given an activation's root, relu(h), instead of its square: float16, whose squares
// underflow. Kernels of other types have no code for it.
template <class T>
inline constexpr bool kHasRoots = std::is_same_v<T, __half>;

#ifdef __CUDACC__  // inline PTX; tests/cpp/emulator/ptx.h has it for hosts
// max(x, 0) that propagates NaN, as torch.relu does (fmaxf would drop it).
__device__ __forceinline__ float relu(float x) {
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
}
// Packs a pair as pack2 rounds it, with max(x, 0) of both in the same instruction. It never gives a negative zero.
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

// Returns the square of one of two numbers of T, in fp32.
template <class T>
__device__ __forceinline__ float square(uint32_t word, int i) {
  const float x = to_float(T{}, uint16_t(i ? word >> 16 : word));
  return __fmul_rn(x, x);
}
// Returns the squares of both, each rounded once. That is what pack2 makes of the squares in fp32, which are exact
// where it matters (below 2^-134 a bfloat16 is zero either way).
template <class T>
__device__ __forceinline__ uint32_t square2(uint32_t word) {
  using P = typename Pair<T>::type;
  const P x = reinterpret_cast<const P&>(word);
  const P square = __hmul2(x, x);
  return reinterpret_cast<const uint32_t&>(square);
}

// Returns the bits of the largest number of 16 bits that does not exceed a float, which is not negative.
__device__ __forceinline__ uint32_t largest_up_to(__nv_bfloat16, float x) { return uint32_t(__float_as_int(x)) >> 16; }
__device__ __forceinline__ uint32_t largest_up_to(__half, float x) { return __half_as_ushort(__float2half_rz(x)); }

// Which of two magnitudes of T exceed a threshold, as a mask. A number of T exceeds a float if it exceeds the largest
// number of T that does not, and magnitudes order as their bits do, with 15 of them, so that no half carries into the
// other; the canonical NaN exceeds all.
template <class T>
__device__ __forceinline__ uint32_t mask_above(float threshold, uint32_t magnitudes) {
  return spread_signs(magnitudes + 0x7fff7fffu - 0x10001u * largest_up_to(T{}, threshold));
}

// An activation of kernels that read h, of T, from memory. Each has kernels of its own, with a threshold too, because
// they are bound by instructions as much as by memory.
template <class T_, Activation kKind, bool kThreshold = false>
struct ElementwiseActivation {
  using T = T_;
  using P = typename Pair<T>::type;
  // Squares are taken of magnitudes; the other activations pass h's own bits.
  static constexpr bool kOfMagnitudes = kKind == Activation::kRelu2;

  float threshold;

  explicit ElementwiseActivation(const ActivationArgs& args) : threshold(args.threshold) {}

  // Loads eight elements of h, with zeros for those that do not exceed the threshold.
  __device__ __forceinline__ Vec8 load(const void* p) const {
    Vec8 v = load16(p);
    if constexpr (kThreshold) {
#pragma unroll
      for (uint32_t& w : v.w) w &= mask_above<T>(threshold, magnitudes(w));
    }
    return v;
  }

  // Returns the magnitudes of the roots of two elements.
  __device__ __forceinline__ static uint32_t magnitudes(uint32_t word) {
    P x = reinterpret_cast<const P&>(word);
    if constexpr (kKind == Activation::kNone) x = __habs2(x);
    const P m = __hmax2_nan(x, P{});  // NaN becomes the canonical one
    return reinterpret_cast<const uint32_t&>(m);
  }

  // Returns y of one of two elements, or of their magnitudes, in fp32.
  __device__ __forceinline__ static float value(uint32_t word, int i) {
    if constexpr (kKind == Activation::kRelu2) return square<T>(word, i);
    const float x = to_float(T{}, uint16_t(i ? word >> 16 : word));
    return kKind == Activation::kNone ? x : relu(x);
  }
  // Returns y of both, in T.
  __device__ __forceinline__ static uint32_t values(uint32_t word) {
    if constexpr (kKind == Activation::kNone) return word;
    if constexpr (kKind == Activation::kRelu) {
      return pack16(value(word, 0) == 0.f ? 0 : uint16_t(word), value(word, 1) == 0.f ? 0 : uint16_t(word >> 16));
    }
    return pack2(T{}, value(word, 0), value(word, 1));
  }

  // Returns the largest of `so_far` and of two elements, both lanes apart. y grows with h, so that activated_max makes
  // the largest |y| of it. NaN does not count.
  __device__ __forceinline__ static P max(P so_far, uint32_t word) {
    P x = reinterpret_cast<const P&>(word);
    if constexpr (kKind == Activation::kNone) x = __habs2(x);
    return __hmax2(so_far, x);
  }
  __device__ __forceinline__ static P max(P so_far, const Vec8& v) {
#pragma unroll
    for (int i = 0; i < 4; ++i) so_far = max(so_far, v.w[i]);
    return so_far;
  }
  __device__ __forceinline__ static float activated_max(P m) {
    const float x = fmaxf(0.f, fmaxf(float(m.x), float(m.y)));
    return kKind == Activation::kRelu2 ? __fmul_rn(x, x) : x;
  }
};

// Calls f with the ElementwiseActivation of T that is asked for.
template <class T, class F>
void dispatch_activation(const ActivationArgs& args, F&& f) {
  const bool above = args.threshold > 0;
  switch (args.kind) {
    case Activation::kNone: return f(ElementwiseActivation<T, Activation::kNone>(args));
    case Activation::kRelu:
      if (above) return f(ElementwiseActivation<T, Activation::kRelu, true>(args));
      return f(ElementwiseActivation<T, Activation::kRelu>(args));
    case Activation::kRelu2:
      if (above) return f(ElementwiseActivation<T, Activation::kRelu2, true>(args));
      return f(ElementwiseActivation<T, Activation::kRelu2>(args));
  }
}

// The activation of the epilogues of the first GEMM, which have h as accumulators and round it to T. It is a choice at
// run time, because a kernel for each would take a minute of compilation.
struct EpilogueActivation {
  Activation kind;  // kRelu: y is its own root

  float threshold;

  static EpilogueActivation of(const ActivationArgs& args) { return {args.kind, args.threshold}; }

  // Returns the roots of two accumulators.
  template <class T>
  __device__ __forceinline__ static uint32_t pack(float lo, float hi) {
    return pack2_relu(T{}, lo, hi);
  }
  // Does what packing leaves to do, for all words of a thread, so that it is decided once.
  template <class T, int kBlocks>
  __device__ __forceinline__ void finish(uint32_t (&roots)[kBlocks][2]) const {
    if (threshold == 0.f) return;
#pragma unroll
    for (auto& block : roots) {
#pragma unroll
      for (uint32_t& w : block) w &= mask_above<T>(threshold, w);
    }
  }

  // Whether y takes the general form of what follows. The other one squares without a choice, but for the roots of
  // training in float16: a choice is an instruction for each value.
  template <class T>
  __device__ __forceinline__ bool is_general() const {
    return !kHasRoots<T> && kind == Activation::kRelu;
  }
  // Return y of the roots in a word: of both in T, of one in fp32.
  template <class T, bool kGeneral>
  __device__ __forceinline__ uint32_t values(uint32_t roots) const {
    return keeps_roots<T, kGeneral>() ? roots : square2<T>(roots);
  }
  template <class T, bool kGeneral>
  __device__ __forceinline__ float value(uint32_t roots, int i) const {
    return keeps_roots<T, kGeneral>() ? to_float(T{}, uint16_t(i ? roots >> 16 : roots)) : square<T>(roots, i);
  }

 private:
  template <class T, bool kGeneral>
  __device__ __forceinline__ bool keeps_roots() const {
    return (kHasRoots<T> || kGeneral) && kind == Activation::kRelu;
  }
};

}  // namespace sparse24::cuda
