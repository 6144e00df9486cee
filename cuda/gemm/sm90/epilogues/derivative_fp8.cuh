// What the epilogues with float8 in and out have in common: accumulators rounded to pairs and traded for tokens, the
// derivative of the squared ReLU on codes, and what is seen of it.
#pragma once

#include <cuda_fp8.h>

#include "common/float8.cuh"
#include "gemm/sm90/epilogues/gradient.cuh"
#include "sparse24/quantize.h"

namespace sparse24::cuda {

// dy of 64 columns, features traded for tokens: of each block of 8 columns two tokens of four features.
struct TradedPart {
  static constexpr int kColumns = 64, kBlocks = kColumns / 8;
  uint32_t of[kBlocks][4];
};

// All accumulators of a thread as pairs of bfloat16. They are rounded before anything else, because they leave no
// registers.
template <int kParts, class Engine, class Layout>
CUTLASS_DEVICE void round_accumulators(cute::Tensor<Engine, Layout> const& acc, TradedPart (&parts)[kParts]) {
  using namespace cute;
  static_assert(decltype(size<1>(acc))::value == 2, "one warpgroup owns the tile, 64 rows at a time");
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < kParts; ++i) {
    CUTLASS_PRAGMA_UNROLL
    for (int j = 0; j < 4 * TradedPart::kBlocks; ++j) {
      const int b = j / 4, token = j % 4;
      const auto of = [&](int c) { return acc(make_coord(c, token % 2, i * TradedPart::kBlocks + b), token / 2, 0); };
      parts[i].of[b][token] = pack2(__nv_bfloat16{}, of(0), of(1));
    }
  }
  compiler_fence();
}

// Codes of dh = dy * 2 sqrt(y) from those of y, by scales of one element each.
struct DerivativeFp8 {
  const float *scale_grad, *scale_w, *scale_y, *scale_dh;
  float* amax;         // of dh
  int32_t* saturated;  // how many of its numbers

  // What a number of dy times its root is multiplied with before it is rounded, and what was seen of those products.
  struct Seen {
    float to_code;
    float largest = 0.f;
    int saturated = 0;
  };
  CUTLASS_DEVICE Seen begin() const { return {__fmul_rn(to_dh(), __frcp_rn(usable_scale(*scale_dh)))}; }

  // Pairs of dy and of y's codes, in step; `largest` grows with the products.
  template <int kCount>
  CUTLASS_DEVICE static void apply(const uint32_t (&dy)[kCount], const uint16_t (&y)[kCount], uint16_t (&dh)[kCount],
                                   float to_code, float& largest) {
    float products[2 * kCount];
    multiply(dy, y, products);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kCount; ++i) {
      float scaled[2];
      CUTLASS_PRAGMA_UNROLL
      for (int c = 0; c < 2; ++c) {
        largest = fmaxf(largest, fabsf(products[2 * i + c]));
        scaled[c] = __fmul_rn(products[2 * i + c], to_code);
      }
      dh[i] = to_e4m3x2(scaled[0], scaled[1]);
    }
  }
  // How many of the same numbers saturate: for when one of them is too large, which is rare.
  template <int kCount>
  CUTLASS_DEVICE static int saturated_of(const uint32_t (&dy)[kCount], const uint16_t (&y)[kCount], float to_code) {
    float products[2 * kCount];
    multiply(dy, y, products);
    int count = 0;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 2 * kCount; ++i) count += exceeds(products[i], to_code);
    return count;
  }
  CUTLASS_DEVICE static bool exceeds(float product, float to_code) {
    return fabsf(__fmul_rn(product, to_code)) > kLargestE4M3;
  }

  CUTLASS_DEVICE void collect(Seen const& seen, int lane) const {
    const float largest = warp_max(seen.largest);
    const int count = __reduce_add_sync(0xffffffffu, seen.saturated);
    if (lane != 0) return;
    // NaN, as infinity times a scale of zero is, does not count.
    const float of_warp = __fmul_rn(largest, to_dh());
    if (of_warp > 0.f) atomicMax(reinterpret_cast<int*>(amax), __float_as_int(of_warp));
    if (count > 0) atomicAdd(saturated, count);
  }

 private:
  template <int kCount>
  CUTLASS_DEVICE static void multiply(const uint32_t (&dy)[kCount], const uint16_t (&y)[kCount],
                                      float (&products)[2 * kCount]) {
    float factors[2 * kCount];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const __half2_raw numbers = __nv_cvt_fp8x2_to_halfraw2(y[i], __NV_E4M3);
      factors[2 * i] = to_float(__half{}, numbers.x);
      factors[2 * i + 1] = to_float(__half{}, numbers.y);
    }
    twice_roots<__nv_fp8_e4m3>(factors, /*roots=*/false);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 2 * kCount; ++i)
      products[i] = __fmul_rn(to_float(__nv_bfloat16{}, uint16_t(dy[i / 2] >> 16 * (i % 2))), factors[i]);
  }

  CUTLASS_DEVICE float to_dh() const { return __fmul_rn(__fmul_rn(*scale_grad, *scale_w), __fsqrt_rn(*scale_y)); }
};

}  // namespace sparse24::cuda
