// The epilogue of linear_compress with a 2:4 weight, whose product is h.T: rows of the tile are features, columns are
// tokens. Activation, two of four and metadata, as epilogues/compress.cuh stores them.
//
// A lane's fragment has two rows and two columns of each block of 8 (epilogues/base.cuh draws it). The weight's rows
// are packed in an order (packed_feature of packed.h) in which rows r and r + 8 of 16 are features 2r and 2r + 1, so
// that lanes 4 r + q and 4 (r ^ 1) + q have four neighbouring features together. They trade features for tokens:
//
//     lane 4 r + q      before                           after
//     even r            features 0, 1, tokens 2q, 2q+1   features 0 .. 3, token 2q
//     odd r             features 2, 3, tokens 2q, 2q+1   features 0 .. 3, token 2q + 1
//
// with tokens t and t + 8 of two blocks in the halves of a word, so that both are traded and selected at once, and are
// neighbours in the metadata of 16 bits. A step finishes four blocks; of their 16 tokens a lane's quad of lanes, those
// that differ in the group of features alone, bring the metadata together.
//
// Rounding and selection are those of elementwise/compress.cu: results are bit-identical to the two steps.
#pragma once

#include "common/packed.cuh"
#include "common/warp.cuh"
#include "gemm/sm90/epilogues/compress.cuh"
#include "gemm/sm90/epilogues/scale_accumulators.cuh"
#include "sparse24/packed.h"
#include "sparsity/select24.cuh"

namespace sparse24::cuda {

// What an epilogue whose rows are features multiplies with and adds: a row has acc * scale + shift, two neighbouring
// columns, which are tokens, have acc * scale.
template <int kTileM, int kTileN>
struct FeatureOperands {
  static constexpr int kM = kTileM, kN = kTileN;
  struct alignas(8) Row {
    float scale;
    float shift;
  };
  struct alignas(8) Columns {
    float scale[2];
  };
  Columns columns[kTileN / 2];
  Row rows[kTileM];
};

// Scales them, the first columns' scales being in registers before the mma are done, as scale_accumulators.cuh says.
template <int kTileM, int kTileN>
class AccumulatorScales<FeatureOperands<kTileM, kTileN>> {
 public:
  using Operands = FeatureOperands<kTileM, kTileN>;
  Operands const& operands;
  const int row;  // the lane's first row in the tile; its other is 8 rows below

  CUTLASS_DEVICE AccumulatorScales(Operands const& operands, int row)
      : operands(operands), row(row), rows_{operands.rows[row], operands.rows[row + 8]} {
    read(0);
  }

  // Hands each block of 8 columns to out.pack(block, two columns of the first row, two of the other).
  template <int kBlocks, class Fragment, class Out>
  CUTLASS_DEVICE void scale(Fragment const& acc, Out& out) {
    static_assert(kBlocks % kAhead == 0, "whole batches");
    CUTLASS_PRAGMA_UNROLL
    for (int first = 0; first < kBlocks; first += kAhead) {
      typename Operands::Columns columns[kAhead];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kAhead; ++i) columns[i] = ahead_[i];
      if (first + kAhead < kBlocks) read(first + kAhead);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        float v[4];
        // The product with the token's scale comes first, as where tokens are rows: the same bits.
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < 4; ++j)
          v[j] = acc(4 * (first + i) + j) * columns[i].scale[j % 2] * rows_[j / 2].scale + rows_[j / 2].shift;
        out.pack(first + i, v[0], v[1], v[2], v[3]);
      }
    }
  }

 private:
  static constexpr int kAhead = 4;  // blocks

  CUTLASS_DEVICE void read(int first) {
    asm volatile("" ::: "memory");  // these are read no sooner, because no registers are left for them
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kAhead; ++i) ahead_[i] = operands.columns[4 * (first + i) + (threadIdx.x & 3)];
  }

  const typename Operands::Row rows_[2];
  typename Operands::Columns ahead_[kAhead];
};

// h is rounded to T, as values are. kFp8Meta gives the metadata the layout of fp8.
template <class T, bool kFp8Meta, int kTileM, int kTileN>
class TransposedCompressEpilogue {
 public:
  using Params = CompressParams;
  using Operands = FeatureOperands<kTileM, kTileN>;
  static constexpr int kSteps = kTileN / 32;
  static_assert(kTileN % 64 == 0 && kTileM % 128 == 0, "tiles cover the metadata's padding");

  CUTLASS_DEVICE explicit TransposedCompressEpilogue(Params const& params) : p_(params) {}

  CUTLASS_HOST_DEVICE static int column_of(Params const&, int column) { return column; }
  // Rows and columns beyond h are never stored, but their metadata is, so that their operands have to be defined.
  CUTLASS_DEVICE static void fetch(Params const& p, int lane, int m, int n, Operands& operands) {
    const LinearParams& h = p.linear;
    // All loads come before the stores, or each would wait for the one before.
    typename Operands::Row rows[kTileM / 32];
    typename Operands::Columns columns[kTileN / 64];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kTileM / 32; ++i) {
      const int feature = m + int(packed_feature(32 * i + lane));
      rows[i] = {1.f, 0.f};
      if (feature < h.cols && h.scale_w) rows[i].scale = h.scale_w[feature * h.scale_w_stride];
      if (feature < h.cols && h.bias) rows[i].shift = float(static_cast<const T*>(h.bias)[feature]);
    }
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kTileN / 64; ++i) {
      columns[i] = {{1.f, 1.f}};
      CUTLASS_PRAGMA_UNROLL
      for (int c = 0; c < 2; ++c) {
        const int token = n + 2 * (32 * i + lane) + c;
        if (token < h.rows && h.scale_x) columns[i].scale[c] = h.scale_x[token * h.scale_x_stride];
      }
    }
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kTileM / 32; ++i) operands.rows[32 * i + lane] = rows[i];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kTileN / 64; ++i) operands.columns[32 * i + lane] = columns[i];
  }
  // Whether the general form of the steps is wanted, which has statistics, and activations beside the squared ReLU.
  CUTLASS_DEVICE bool is_general() const {
    return p_.linear.amax || p_.linear.saturated || p_.linear.activation.template is_general<T>();
  }

  template <class Fragment, class Scales>
  CUTLASS_DEVICE void begin(int m, int n, Fragment const& acc, Scales& scales) {
    const LinearParams& h = p_.linear;
    const int first = m + scales.row / 16 * 16;  // of the 16 features of the warp
    token_ = n + 2 * (threadIdx.x & 3) + high_token();
    left_ = first < h.cols ? h.rows - token_ : 0;
    meta_left_ = first < p_.a.k_meta ? int(p_.a.m_meta) - token_ : 0;
    values_ = static_cast<T*>(p_.values) + value_offset(token_) + first / 2 + 2 * group();
    if constexpr (kFp8Meta) {
      meta_ = p_.meta + (uint64_t(first / 128) * p_.a.m_meta + token_ + gathered_token()) * 16 + first % 128 / 8;
    } else {
      meta_ = p_.meta + uint64_t(first / 64) * p_.a.m_meta * 8 + uint64_t(n + gathered_token()) * 8 +
              first % 32 / 16 * 64 + token_ % 8 * 8 + first % 64 / 32 * 4;
    }

    if (h.scale_x || h.scale_w || h.bias) {
      scales.template scale<kBlocks>(acc, *this);
    } else {
      CUTLASS_PRAGMA_UNROLL
      for (int b = 0; b < kBlocks; ++b) pack(b, acc(4 * b), acc(4 * b + 1), acc(4 * b + 2), acc(4 * b + 3));
    }
    h.activation.finish<T>(roots_);
  }

  // Takes tokens 2q and 2q + 1 of block b of row r, then the same of row r + 8.
  CUTLASS_DEVICE void pack(int b, float h00, float h01, float h10, float h11) {
    using A = EpilogueActivation;
    if (b % 2 == 0) {
      even_[0] = h00, even_[1] = h01, even_[2] = h10, even_[3] = h11;
      return;
    }
    roots_[b - 1][0] = A::pack<T>(even_[0], h00);
    roots_[b - 1][1] = A::pack<T>(even_[2], h10);
    roots_[b][0] = A::pack<T>(even_[1], h01);
    roots_[b][1] = A::pack<T>(even_[3], h11);
  }

  template <int kStep, bool kGeneral>
  CUTLASS_DEVICE void visit() {
    uint32_t nibbles[2], kept[4];  // kept pairs of roots: of token t of both pairs of blocks, then of t + 8
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 2; ++i) {
      constexpr int kFirst = 4 * kStep;  // block
      uint32_t m[4] = {roots_[kFirst + 2 * i][0], roots_[kFirst + 2 * i][1], roots_[kFirst + 2 * i + 1][0],
                       roots_[kFirst + 2 * i + 1][1]};
      transpose_pair<4>(m[0], m[2], high_token());
      transpose_pair<4>(m[1], m[3], high_token());
      const KeptPairs of_both = keep_two_pairs(m, m);
      nibbles[i] = of_both.nibbles & 0x000f000fu << 4 * group();
      kept[i] = __byte_perm(of_both.first, of_both.second, 0x5410);
      kept[i + 2] = __byte_perm(of_both.first, of_both.second, 0x7632);
    }
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int token = 32 * kStep + 16 * (i % 2) + 8 * (i / 2);
      if (kGeneral && exists(token)) {  // the largest of a group is always kept
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < 2; ++j) seen_.see(p_.linear.activation.value<T, kGeneral>(kept[i], j), 0.f);
      }
      store_pair(token, p_.linear.activation.values<T, kGeneral>(kept[i]));
    }
    store_meta<kStep>(nibbles);
    if constexpr (kGeneral && kStep == kSteps - 1) {
      seen_.collect(p_.linear);
      seen_ = {};
    }
  }

 private:
  static constexpr int kBlocks = kTileN / 8;

  // Lane 4 r + q: r is 2 group() + high_token().
  CUTLASS_DEVICE static bool high_token() { return threadIdx.x & 4; }
  CUTLASS_DEVICE static int group() { return threadIdx.x >> 3 & 3; }
  // The lanes of four groups share four tokens of a step; each gathers what one of them has: tokens 16 apart by bit 0
  // of the group, and 8 by bit 1.
  CUTLASS_DEVICE static int gathered_token() { return 16 * (group() & 1) + 8 * (group() >> 1); }

  // Whether h has this group of a token, counted from the lane's first. A row beyond the last is whatever x holds: NaN
  // times its zeros is none of the result's.
  CUTLASS_DEVICE bool exists(int token) const { return token < left_; }
  CUTLASS_DEVICE uint64_t value_offset(int token) const {
    return uint64_t(uint32_t(token)) * uint32_t(p_.linear.cols / 2);
  }

  CUTLASS_DEVICE void store_pair(int token, uint32_t pair) const {
    if (exists(token)) *reinterpret_cast<uint32_t*>(values_ + value_offset(token)) = pair;
  }

  // Brings the nibbles of 16 features together: afterwards a lane has those of tokens t and t + 8 of two of the four
  // blocks, the lanes of even groups of the first two.
  template <int kStep>
  CUTLASS_DEVICE void store_meta(uint32_t (&nibbles)[2]) const {
    transpose_pair<8>(nibbles[0], nibbles[1], group() & 1);
    uint32_t both = nibbles[0] | nibbles[1];
    both |= __shfl_xor_sync(0xffffffffu, both, 16);
    const int token = 32 * kStep + 16 * (group() & 1);
    const uint32_t present = (exists(token) ? 0xffffu : 0u) | (exists(token + 8) ? 0xffff0000u : 0u);
    both = (both & present) | (0x01010101u * kMetaPaddingByte & ~present);
    if (token >= meta_left_) return;
    if constexpr (kFp8Meta) {
      *reinterpret_cast<uint16_t*>(meta_ + 16 * 32 * kStep) = uint16_t(group() >> 1 ? both >> 16 : both);
    } else if (group() < 2) {
      *reinterpret_cast<uint32_t*>(meta_ + 8 * 32 * kStep) = both;
    }
  }

  Params const& p_;
  uint32_t roots_[kBlocks][2] = {};  // of blocks b and b + 1, b even: token 2q of both, of both rows; then token 2q + 1
  float even_[4];
  ActivationStatistics seen_;
  int token_ = 0;        // the lane's first of the tile
  int left_ = 0;         // tokens from it on; 0: the features do not exist
  int meta_left_ = 0;    // tokens of the metadata
  T* values_ = nullptr;  // what this lane stores of the first tokens
  uint8_t* meta_ = nullptr;
};

}  // namespace sparse24::cuda
