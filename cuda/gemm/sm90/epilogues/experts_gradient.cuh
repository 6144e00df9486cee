// The epilogue of linear_gradient for experts, in steps (epilogues/steps.cuh): dh = row_scale * dy * 2 sqrt(y) at the
// entries that the forward pass kept, which experts_mm multiplies with the first weights; dh and row_scale * y once
// more as dense matrices, for the products over rows; and of each row the sum of y * dy, the gradient of its factor.
//
// A lane's fragment has two columns of each block of 8 (epilogues/base.cuh draws it). Four steps finish 64 columns, two
// for row r and two for row r + 8. The lanes of a quad trade their columns first, so that each has 16 neighbours:
//
//     lane q    before                                           after
//               columns 2q, 2q + 1 of blocks 0 .. 7 of a row     blocks 2q and 2q + 1: four groups, 16 bytes of values,
//                                                                and the metadata that format.h draws
//
// Of float8 operands w is K-major, and its rows come in an order that gives lanes those (epilogues/permuted_n.cuh).
//
// y has been stored by padded rows. What the next 64 columns need of it is on its way while these are finished.
#pragma once

#include "common/float8.cuh"
#include "common/packed.cuh"
#include "common/warp.cuh"
#include "gemm/sm90/epilogues/derivative.cuh"
#include "gemm/sm90/epilogues/permuted_n.cuh"
#include "gemm/sm90/epilogues/steps.cuh"
#include "sparsity/kept_pattern.cuh"

namespace sparse24::cuda {

// ExpertsLinearGradientArgs as the device sees them.
struct ExpertsGradientParams {
  int rows, cols, padded_rows;  // of dh, and of y
  const void* y;                // kept values
  const uint8_t* meta;
  const float* row_scale;  // null: 1
  void* dh;
  void* dh_dense;  // null: neither is wanted
  void* y_dense;
  float* products;  // [tiles of columns, rows]: sums of y * dy; null: not wanted

  // Of float8 operands, null: 1.
  const float* scale_grad = nullptr;  // [rows], or one element
  const float* scale_w = nullptr;     // [experts, cols], or [experts]
  const float* scale_y = nullptr;     // [padded_rows]
  int scale_grad_stride = 0;          // 0: one element
  int scale_w_stride = 0;             // 0: one an expert
};

// Results are of the 16-bit type T. So is y, or with kFp8 it is float8 and has metadata in the layout of fp8.
template <class T, bool kFp8, int kTileM, int kTileN>
class ExpertsGradientEpilogue {
 public:
  using Params = ExpertsGradientParams;
  using Operands = EpilogueOperands<kTileM, kTileN>;
  using Permutation = PermutedN<16>;
  static constexpr int kSteps = kTileN / 16;
  static_assert(kTileN % 64 == 0, "whole atoms of the metadata");

  CUTLASS_DEVICE explicit ExpertsGradientEpilogue(Params const& params) : p_(params) {}

  template <class Place>
  CUTLASS_DEVICE static void fetch(Params const& p, int lane, Place const& at, Operands& operands) {
    CUTLASS_PRAGMA_UNROLL
    for (int i = lane; i < kTileM; i += 32) {
      typename Operands::Row row{1.f, 1.f};
      if (i < at.rows()) {
        if (kFp8 && p.scale_grad) row.scale = p.scale_grad[int64_t(at.row + i) * p.scale_grad_stride];
        if (p.row_scale) row.out_scale = p.row_scale[at.row + i];
      }
      operands.rows[i] = row;
    }
    if constexpr (kFp8) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = lane; i < kTileN / 2; i += 32) {
        typename Operands::Columns columns{{1.f, 1.f}, {0.f, 0.f}};
        CUTLASS_PRAGMA_UNROLL
        for (int c = 0; c < 2; ++c) {
          const int column = min(at.n * kTileN + Permutation::feature(2 * i + c), p.cols - 1);
          if (p.scale_w)
            columns.scale[c] = p.scale_w[p.scale_w_stride ? int64_t(at.expert) * p.cols + column : at.expert];
        }
        operands.columns[i] = columns;
      }
    }
  }
  CUTLASS_DEVICE bool is_general() const { return false; }

  template <class Place, class Fragment, class Scales>
  CUTLASS_DEVICE void begin(Place const& at, Fragment const& acc, Scales& scales) {
    const int q = threadIdx.x & 3, n = at.n * kTileN, column = n + 16 * q;
    CUTLASS_PRAGMA_UNROLL
    for (int half = 0; half < 2; ++half) {
      left_[half] = scales.row + 8 * half < at.rows() ? p_.cols - column : 0;
      row_scale_[half] = scales.operands.rows[scales.row + 8 * half].out_scale;
    }
    row_ = at.row + scales.row;
    tile_ = at.n;
    const int padded = at.padded_row + scales.row;
    dense_ = uint64_t(uint32_t(row_)) * uint32_t(p_.cols) + column;
    kept_ = (uint64_t(uint32_t(padded)) * uint32_t(p_.cols) + column) / 2;
    if constexpr (kFp8) {
      meta_ = p_.meta + int64_t(padded) * 16 + 2 * q;
      CUTLASS_PRAGMA_UNROLL
      for (int half = 0; half < 2; ++half)
        scale_y_[half] = p_.scale_y && left_[half] > 0 ? p_.scale_y[padded + 8 * half] : 1.f;
    } else {
      meta_ = p_.meta + uint64_t(uint32_t(n / 64 * 8)) * uint32_t(p_.padded_rows) + padded / 16 * 128 + (q & 1) * 64 +
              padded % 8 * 8 + (q >> 1) * 4;
    }
    load<0>();
    Words words{words_};
    if constexpr (kFp8) {
      scales.template scale<kTileN / 8>(acc, words);
    } else {
      CUTLASS_PRAGMA_UNROLL
      for (int b = 0; b < kTileN / 8; ++b) words.pack(b, acc(4 * b), acc(4 * b + 1), acc(4 * b + 2), acc(4 * b + 3));
    }
  }
  // Makes visits store nothing.
  CUTLASS_DEVICE void forget() { left_[0] = left_[1] = 0; }

  template <int kStep, bool kGeneral>
  CUTLASS_DEVICE void visit() {
    constexpr int kBlock = kStep / 4, half = kStep % 4 / 2;  // of 64 columns; of the rows
    if constexpr (kStep % 2 == 0) {
      differentiate<kBlock, half>();
    } else {
      store_dense<kBlock, half>();
      if constexpr (half == 1 && kStep + 1 < kSteps) load<kBlock + 1>();
      if constexpr (kStep + 1 == kSteps) store_products();
    }
  }

  // Lets a warp write zeros to the sums of some of the rows of no expert, from `first` on.
  CUTLASS_DEVICE static void clear(Params const& p, int lane, int first, int stride) {
    if (!p.products) return;
    for (int row = first; row < p.rows; row += stride) {
      for (int tile = lane; tile < cutlass::ceil_div(p.cols, kTileN); tile += 32)
        p.products[int64_t(tile) * p.rows + row] = 0.f;
    }
  }

 private:
  static constexpr int kGroups = 4;  // of a lane, in a block

  // Packs two columns into a word, of row r and of row r + 8.
  struct Words {
    uint32_t (&of)[kTileN / 8][2];

    CUTLASS_DEVICE void pack(int b, float v00, float v01, float v10, float v11) {
      of[b][0] = pack2(T{}, v00, v01);
      of[b][1] = pack2(T{}, v10, v11);
    }
  };

  CUTLASS_DEVICE bool exists(int block, int half) const { return 64 * block < left_[half]; }

  // Loads what the forward pass kept. It does not use load16, because the kernel may have started while the one before
  // it was writing this, which is therefore not read-only.
  template <int kBlock>
  CUTLASS_DEVICE void load() {
    CUTLASS_PRAGMA_UNROLL
    for (int half = 0; half < 2; ++half) {
      y_[half] = uint4{};
      if (!exists(kBlock, half)) continue;
      const uint64_t at = kept_ + of_row(half) / 2 + 32 * kBlock;
      if constexpr (kFp8) {
        const uint2 codes = *reinterpret_cast<const uint2*>(static_cast<const uint8_t*>(p_.y) + at);
        y_[half].x = codes.x, y_[half].y = codes.y;
      } else {
        y_[half] = *reinterpret_cast<const uint4*>(static_cast<const T*>(p_.y) + at);
      }
    }
    nibbles_ = 0;
    if constexpr (kFp8) {
      const int column = tile_ * kTileN + 64 * kBlock;
      const uint8_t* meta = meta_ + int64_t(column / 128) * 16 * p_.padded_rows + column % 128 / 8;
      if (exists(kBlock, 0)) nibbles_ = *reinterpret_cast<const uint16_t*>(meta);
      if (exists(kBlock, 1)) nibbles_ |= uint32_t{*reinterpret_cast<const uint16_t*>(meta + 8 * 16)} << 16;
    } else {
      if (exists(kBlock, 0))
        nibbles_ = *reinterpret_cast<const uint32_t*>(meta_ + uint64_t(8 * kBlock) * uint32_t(p_.padded_rows));
    }
  }

  // Makes numbers T of the codes of y in row r or r + 8, once for what follows.
  template <int half>
  CUTLASS_DEVICE void dequantize() {
    const uint32_t codes[2] = {y_[half].x, y_[half].y};
    uint32_t y[kGroups];
    CUTLASS_PRAGMA_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      const __half2_raw pair = __nv_cvt_fp8x2_to_halfraw2(uint16_t(codes[g / 2] >> 16 * (g % 2)), __NV_E4M3);
      y[g] = pack2(T{}, __fmul_rn(to_float(__half{}, pair.x), scale_y_[half]),
                   __fmul_rn(to_float(__half{}, pair.y), scale_y_[half]));
    }
    y_[half] = uint4{y[0], y[1], y[2], y[3]};
  }

  // Computes dh of row r or r + 8, and stores its kept values.
  template <int kBlock, int half>
  CUTLASS_DEVICE void differentiate() {
    uint32_t dy[2][kGroups];  // of a block of 8 each
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 2; ++i) {
      CUTLASS_PRAGMA_UNROLL
      for (int b = 0; b < 4; ++b) dy[i][b] = words_[8 * kBlock + (kFp8 ? 4 * i + b : 2 * b + i)][half];
      if (!kFp8) transpose_quad(dy[i], threadIdx.x & 3);
    }
    if (kFp8) dequantize<half>();
    const Pattern pattern = pattern_of(half);
    const uint32_t y[kGroups] = {y_[half].x, y_[half].y, y_[half].z, y_[half].w};
    float factors[2 * kGroups];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 2 * kGroups; ++i) factors[i] = to_float(T{}, uint16_t(y[i / 2] >> 16 * (i % 2)));
    float sum = 0.f;
    CUTLASS_PRAGMA_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      dh_[g] = pattern.kept(g, dy[g / 2][g % 2 * 2], dy[g / 2][g % 2 * 2 + 1]);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 2; ++i) sum += factors[2 * g + i] * to_float(T{}, uint16_t(dh_[g] >> 16 * i));
    }
    twice_roots<T>(factors, false);
    CUTLASS_PRAGMA_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      float v[2];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 2; ++i)
        v[i] = __fmul_rn(__fmul_rn(to_float(T{}, uint16_t(dh_[g] >> 16 * i)), factors[2 * g + i]), row_scale_[half]);
      dh_[g] = pack2(T{}, v[0], v[1]);
    }
    if (!exists(kBlock, half)) return;
    sum_[half] += sum;
    store16(static_cast<T*>(p_.dh) + kept_ + of_row(half) / 2 + 32 * kBlock, dh_[0], dh_[1], dh_[2], dh_[3]);
  }

  // Stores the same 16 columns of dh, and those of row_scale * y, with their zeros.
  template <int kBlock, int half>
  CUTLASS_DEVICE void store_dense() const {
    if (!p_.dh_dense || !exists(kBlock, half)) return;
    const uint64_t at = dense_ + of_row(half) + 64 * kBlock;
    store_spread(static_cast<T*>(p_.dh_dense) + at, pattern_of(half), dh_);
    uint32_t y[kGroups] = {y_[half].x, y_[half].y, y_[half].z, y_[half].w};
    CUTLASS_PRAGMA_UNROLL
    for (uint32_t& pair : y) {
      pair = pack2(T{}, __fmul_rn(to_float(T{}, uint16_t(pair)), row_scale_[half]),
                   __fmul_rn(to_float(T{}, uint16_t(pair >> 16)), row_scale_[half]));
    }
    store_spread(static_cast<T*>(p_.y_dense) + at, pattern_of(half), y);
  }
  CUTLASS_DEVICE static void store_spread(T* to, Pattern const& pattern, uint32_t const (&pairs)[kGroups]) {
    CUTLASS_PRAGMA_UNROLL
    for (int g = 0; g < kGroups; g += 2) {
      uint32_t w[4];
      pattern.spread(g, pairs[g], w[0], w[1]);
      pattern.spread(g + 1, pairs[g + 1], w[2], w[3]);
      store16(to + 4 * g, w[0], w[1], w[2], w[3]);
    }
  }

  // Adds up the sums of a quad, each of whose lanes has other columns.
  CUTLASS_DEVICE void store_products() {
    CUTLASS_PRAGMA_UNROLL
    for (int half = 0; half < 2; ++half) {
      float sum = sum_[half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (p_.products && (threadIdx.x & 3) == 0 && left_[half] > 0)
        p_.products[int64_t(tile_) * p_.rows + row_ + 8 * half] = sum;
      sum_[half] = 0.f;
    }
  }

  // The nibbles of four groups of row r, in the lower half of what was loaded, or of row r + 8.
  CUTLASS_DEVICE Pattern pattern_of(int half) const {
    const uint32_t n = nibbles_ >> 16 * half;
    return {{(n & 0xfu) | (n & 0xf0u) << 4 | (n & 0xf00u) << 8 | (n & 0xf000u) << 12, 0u}};
  }
  CUTLASS_DEVICE uint64_t of_row(int half) const { return uint64_t(8 * half) * uint32_t(p_.cols); }

  Params const& p_;
  int row_ = 0, tile_ = 0;  // the lane's row r; the tile along the columns
  uint64_t dense_ = 0;      // the lane's first element of row r, in dense matrices
  uint64_t kept_ = 0;       // and in kept values
  const uint8_t* meta_ = nullptr;
  int left_[2] = {};  // columns from there on, in rows r and r + 8
  float row_scale_[2] = {};
  float scale_y_[2] = {};      // of codes
  float sum_[2] = {};          // of y * dy
  uint4 y_[2] = {};            // kept values of 16 columns of both rows
  uint32_t nibbles_ = 0;       // theirs
  uint32_t dh_[kGroups] = {};  // of the row whose values were stored last
  uint32_t words_[kTileN / 8][2] = {};
};

}  // namespace sparse24::cuda
