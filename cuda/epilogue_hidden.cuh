// What the epilogues of the first GEMM share: the pre-activation h of the accumulators, and statistics of y.
#pragma once

#include "epilogue_base.cuh"
#include "epilogue_terms.cuh"
#include "sparse24/linear.h"
#include "vocabulary.cuh"

namespace sparse24::cuda {

// Arguments as the device sees them.
struct HiddenParams {
  int rows, cols;  // of h
  const float* scale_x;
  const float* scale_w;
  const void* bias;  // of the hidden type
  const float* scale_y;
  float* amax;
  int32_t* saturated;
  int scale_x_stride;  // 0: one element, 1: one per row
  int scale_w_stride;
  int scale_y_stride;

  static HiddenParams of(const LinearArgs& args) {
    return {int(args.tokens),    int(args.out), args.scale_x,   args.scale_w,         args.bias,
            args.scale_y,        args.amax,     args.saturated, args.scale_x_per_row, args.scale_w_per_row,
            args.scale_y_per_row};
  }

  // The terms of a tile, by the lanes of a warp. T: the hidden type. Rows and columns beyond h are never stored, but
  // their metadata is: their terms are defined.
  template <class T, int kTileM, int kTileN>
  __device__ __forceinline__ void fetch(int lane, int m_tile, int n_tile, TileTerms<kTileM, kTileN>& terms) const {
    using Terms = TileTerms<kTileM, kTileN>;
    const auto row = [&](int i) {
      const int m = m_tile + i;
      typename Terms::Row out{1.f, 1.f};
      if (m < rows && scale_x) out.scale = scale_x[m * scale_x_stride];
      if (m < rows && scale_y) out.out_scale = __frcp_rn(scale_y[m * scale_y_stride]);
      return out;
    };
    const auto columns = [&](int i) {
      typename Terms::Columns out{{1.f, 1.f}, {0.f, 0.f}};
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int n = n_tile + i + c;
        if (n < cols && scale_w) out.scale[c] = scale_w[n * scale_w_stride];
        if (n < cols && bias) out.shift[c] = float(static_cast<const T*>(bias)[n]);
      }
      return out;
    };
    terms.fetch(lane, row, columns);
  }
};

// The pre-activations of a thread, rounded to T: of block b the pairs of row r and of row r + 8.
template <class T, int kColumns>
struct HiddenFragment {
  static constexpr int kBlocks = kColumns / 8;
  uint32_t of[kBlocks][2] = {};

  // `row`: of r in the tile.
  template <class Fragment, class Terms>
  __device__ __forceinline__ void take(const HiddenParams& p, int row, Fragment const& acc, Terms const& terms) {
    if (!p.scale_x && !p.scale_w && !p.bias) {
#pragma unroll
      for (int i = 0; i < 2 * kBlocks; ++i) of[i / 2][i % 2] = pack2(T{}, acc(2 * i), acc(2 * i + 1));
      return;
    }
    const int q = threadIdx.x & 3;
    const float scale_x[2] = {terms.rows[row].scale, terms.rows[row + 8].scale};
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      if (b % 8 == 0) asm volatile("" ::: "memory");  // keeps the reads of later columns out: registers
      const auto of_columns = terms.columns[4 * b + q];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float h0 = acc(4 * b + 2 * half) * scale_x[half] * of_columns.scale[0];
        const float h1 = acc(4 * b + 2 * half + 1) * scale_x[half] * of_columns.scale[1];
        of[b][half] = pack2(T{}, h0 + of_columns.shift[0], h1 + of_columns.shift[1]);
      }
    }
  }
};

// Running statistics of a thread. y is not negative, so its bits order like integers; fmaxf drops NaN.
struct HiddenStatistics {
  float amax = 0.f;
  int saturated = 0;

  // The inverse scale is 0 where y is not scaled, and cannot saturate.
  __device__ __forceinline__ void see(float y, float inverse_scale) {
    amax = fmaxf(amax, y);
    saturated += y * inverse_scale > 448.f;
  }
  __device__ __forceinline__ void collect(const HiddenParams& p) const {
    if (p.amax) {
      const float v = warp_max(amax);
      if (threadIdx.x % 32 == 0) atomicMax(reinterpret_cast<int*>(p.amax), __float_as_int(v));
    }
    if (p.saturated) {
      const int n = __reduce_add_sync(0xffffffffu, saturated);
      if (threadIdx.x % 32 == 0 && n > 0) atomicAdd(p.saturated, n);
    }
  }
};

// What the epilogues in steps (epilogue_steps.cuh) of linear_compress and linear_relu2 have in common: two blocks a
// step. T: the type that h is rounded to.
template <class Params_, class T, int kTileM, int kTileN>
class HiddenEpilogue {
 public:
  using Params = Params_;
  using Terms = TileTerms<kTileM, kTileN>;
  static constexpr int kSteps = kTileN / 16;

  CUTLASS_DEVICE explicit HiddenEpilogue(Params const& params) : p_(params) {}

  CUTLASS_DEVICE static void fetch(Params const& p, int lane, int m, int n, Terms& terms) {
    p.hidden.template fetch<T>(lane, m, n, terms);
  }
  CUTLASS_DEVICE bool counts() const { return p_.hidden.amax || p_.hidden.saturated; }

 protected:
  // Behind a step.
  template <int kStep, bool kCounts>
  CUTLASS_DEVICE void collect() {
    if constexpr (kCounts && kStep == kSteps - 1) {
      seen_.collect(p_.hidden);
      seen_ = {};
    }
  }

  Params const& p_;
  HiddenFragment<T, kTileN> h_;
  HiddenStatistics seen_;
};

}  // namespace sparse24::cuda
