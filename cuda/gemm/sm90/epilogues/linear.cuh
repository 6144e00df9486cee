// What the epilogues of linear_relu2 and linear_compress, the first GEMM, have in common: they take the roots max(h, 0)
// from the accumulators, and collect statistics of y.
#pragma once

#include "common/activation.cuh"
#include "common/packed.cuh"
#include "common/warp.cuh"
#include "gemm/sm90/epilogues/base.cuh"
#include "gemm/sm90/epilogues/operands.cuh"
#include "gemm/sm90/epilogues/permuted_n.cuh"
#include "gemm/sm90/epilogues/scale_accumulators.cuh"
#include "sparse24/linear.h"
#include "sparse24/quantize.h"

namespace sparse24::cuda {

// LinearArgs as the device sees them.
struct LinearParams {
  int rows, cols;  // of h
  const float* scale_x;
  const float* scale_w;
  const void* bias;  // of the type that h is rounded to
  const float* scale_y;
  float* amax;
  int32_t* saturated;
  int scale_x_stride;  // 0: one element, 1: one per row
  int scale_w_stride;
  int scale_y_stride;
  EpilogueActivation activation;

  static LinearParams of(const LinearArgs& args) {
    return {int(args.tokens),
            int(args.out),
            args.scale_x,
            args.scale_w,
            args.bias,
            args.scale_y,
            args.amax,
            args.saturated,
            args.scale_x_per_row,
            args.scale_w_per_row,
            args.scale_y_per_row,
            EpilogueActivation::of(args.activation)};
  }

  // Lets a lane of the warp that fetches bring its share of the operands of a tile, whose columns are features in the
  // order of Permutation. Rows and columns beyond h are never stored, but their metadata is, so that their operands
  // have to be defined.
  template <class T, class Permutation, int kTileM, int kTileN>
  __device__ __forceinline__ void fetch(int lane, int m_tile, int n_tile,
                                        EpilogueOperands<kTileM, kTileN>& operands) const {
    using Operands = EpilogueOperands<kTileM, kTileN>;
    const auto row = [&](int i) {
      const int m = m_tile + i;
      typename Operands::Row out{1.f, 1.f};
      if (m < rows && scale_x) out.scale = scale_x[m * scale_x_stride];
      if (m < rows && scale_y) out.out_scale = __frcp_rn(usable_scale(scale_y[m * scale_y_stride]));
      return out;
    };
    const auto columns = [&](int i) {
      typename Operands::Columns out{{1.f, 1.f}, {0.f, 0.f}};
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int n = n_tile + Permutation::feature(i + c);
        if (n < cols && scale_w) out.scale[c] = scale_w[n * scale_w_stride];
        if (n < cols && bias) out.shift[c] = float(static_cast<const T*>(bias)[n]);
      }
      return out;
    };
    operands.fetch(lane, row, columns);
  }
};

// The roots max(h, 0) that a thread has of a tile, rounded to T, as words of two. Block b has a word of two neighbours
// for row r and one for row r + 8. With kRowPairs it has a word of both rows for its first column and one for its
// second, because that is what two groups at once are selected from (sparsity/select24.cuh).
template <class T, int kColumns, bool kRowPairs>
struct RootFragment {
  static constexpr int kBlocks = kColumns / 8;
  uint32_t of[kBlocks][2] = {};

  template <class Fragment, class Scales>
  __device__ __forceinline__ void take(const LinearParams& p, Fragment const& acc, Scales& scales) {
    if (p.scale_x || p.scale_w || p.bias) {
      scales.template scale<kBlocks>(acc, *this);
    } else {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) pack(b, acc(4 * b), acc(4 * b + 1), acc(4 * b + 2), acc(4 * b + 3));
    }
    p.activation.finish<T>(of);
  }

  // Takes two columns of row r, then the same of row r + 8.
  __device__ __forceinline__ void pack(int b, float h00, float h01, float h10, float h11) {
    using A = EpilogueActivation;
    of[b][0] = kRowPairs ? A::pack<T>(h00, h10) : A::pack<T>(h00, h01);
    of[b][1] = kRowPairs ? A::pack<T>(h01, h11) : A::pack<T>(h10, h11);
  }
};

// The statistics of all that a thread has seen. y is not negative, so that its bits order like integers; fmaxf drops
// NaN.
struct ActivationStatistics {
  float amax = 0.f;
  int saturated = 0;

  __device__ __forceinline__ void see(float y, float inverse_scale) {
    amax = fmaxf(amax, y);
    saturated += exceeds(y, inverse_scale);
  }
  // Whether y saturates, and so whatever is larger. The inverse scale is 0 where y is not scaled, and cannot saturate.
  __device__ __forceinline__ static bool exceeds(float y, float inverse_scale) {
    return fabsf(y * inverse_scale) > kLargestE4M3;
  }
  __device__ __forceinline__ void collect(const LinearParams& p) const {
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

// Returns the larger one of two roots, in both halves; NaN does not count.
template <class T>
__device__ __forceinline__ uint32_t larger_roots(uint32_t a, uint32_t b) {
  using P = typename Pair<T>::type;
  const P larger = __hmax2(reinterpret_cast<const P&>(a), reinterpret_cast<const P&>(b));
  return reinterpret_cast<const uint32_t&>(larger);
}

// The part of both epilogues that does not depend on how y is stored. They come in steps (epilogues/steps.cuh) of two
// blocks. h is rounded to T, a lane's runs have kRun features, and kRowPairs is that of its RootFragment.
template <class Params_, class T, int kTileM, int kTileN, int kRun, bool kRowPairs>
class LinearEpilogue {
 public:
  using Params = Params_;
  using Hidden = T;
  using Permutation = PermutedN<kRun>;
  using Operands = EpilogueOperands<kTileM, kTileN>;
  static constexpr int kSteps = kTileN / 16;

  CUTLASS_DEVICE explicit LinearEpilogue(Params const& params) : p_(params) {}

  CUTLASS_DEVICE static void fetch(Params const& p, int lane, int m, int n, Operands& operands) {
    p.linear.template fetch<T, Permutation>(lane, m, n, operands);
  }
  CUTLASS_HOST_DEVICE static int column_of(Params const&, int column) { return Permutation::feature(column); }
  // Whether the general form of the steps is wanted, which counts what saturates, and has activations beside the
  // squared ReLU.
  CUTLASS_DEVICE bool is_general() const { return saturates_ || p_.linear.activation.template is_general<T>(); }

 protected:
  // Finds the place of the lane's run of row r in a tile, once for all of its blocks, and with kFp8 the scales of both
  // rows; `rows` is where those of h end. Returns the index of the run's first element.
  template <bool kFp8, class Scales>
  CUTLASS_DEVICE uint64_t locate(int m, int n, int rows, Scales const& scales) {
    const int row = scales.row;
    const LinearParams& h = p_.linear;
    const int column = n + kRun * (threadIdx.x & 3);
    CUTLASS_PRAGMA_UNROLL
    for (int half = 0; half < 2; ++half) {
      left_[half] = m + row + 8 * half < rows ? h.cols - column : 0;
      if constexpr (kFp8) inverse_scale_[half] = scales.operands.rows[row + 8 * half].out_scale;
    }
    return uint64_t(m + row) * uint32_t(h.cols) + column;
  }
  // Finds the largest y of a tile, if statistics are wanted, and whether a warp has any that saturates: what the steps
  // would see costs them an instruction a value, and what saturates three.
  CUTLASS_DEVICE void see_largest() {
    if (!wants_statistics()) return;
    uint32_t largest[2] = {};  // of both words of a block
    CUTLASS_PRAGMA_UNROLL
    for (auto const& block : h_.of) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 2; ++i) largest[i] = larger_roots<T>(largest[i], block[i]);
    }
    bool saturates = false;
    CUTLASS_PRAGMA_UNROLL
    for (int half = 0; half < 2; ++half) {
      if (!exists(0, half)) continue;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 2; ++i) {  // a row has a half of both words, or both halves of a word
        const float y = kRowPairs ? activated<true>(largest[i], half) : activated<true>(largest[half], i);
        seen_.amax = fmaxf(seen_.amax, y);
        saturates |= ActivationStatistics::exceeds(y, inverse_scale_[half]);
      }
    }
    saturates_ = __ballot_sync(0xffffffffu, saturates) != 0;
  }
  // Makes visits store no values.
  CUTLASS_DEVICE void forget() { left_[0] = left_[1] = 0; }
  // Whether h has the run of the block at a column of the tile, in row r or r + 8. A row beyond the last is whatever w
  // holds: NaN times its zeros is none of the result's.
  CUTLASS_DEVICE bool exists(int block, int half) const { return block < left_[half]; }

  // Return y of the roots in a word: of both in T, of one in fp32.
  template <bool kGeneral>
  CUTLASS_DEVICE uint32_t activated2(uint32_t roots) const {
    return p_.linear.activation.template values<T, kGeneral>(roots);
  }
  template <bool kGeneral>
  CUTLASS_DEVICE float activated(uint32_t roots, int i) const {
    return p_.linear.activation.template value<T, kGeneral>(roots, i);
  }

  // Stands behind every step; the last one of a tile collects what was seen of it.
  template <int kStep>
  CUTLASS_DEVICE void collect() {
    if (kStep == kSteps - 1 && wants_statistics()) {
      seen_.collect(p_.linear);
      seen_ = {};
    }
  }

  Params const& p_;
  RootFragment<T, kTileN, kRowPairs> h_;
  ActivationStatistics seen_;
  float inverse_scale_[2] = {};  // of rows r and r + 8; 0: y is not scaled

 private:
  CUTLASS_DEVICE bool wants_statistics() const { return p_.linear.amax || p_.linear.saturated; }

  int left_[2] = {};        // columns from the lane's first on
  bool saturates_ = false;  // whether any y of the warp's tile does
};

}  // namespace sparse24::cuda
