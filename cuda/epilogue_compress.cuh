// The epilogue of linear_compress: activation, two of four and metadata, straight from the accumulators.
//
// A lane's runs are 16 features of rows r and r + 8 (lane_runs.cuh), four groups each, so that nothing is exchanged but
// metadata. The same group of both rows is selected at once:
//
//     step              4 c          4 c + 1      4 c + 2      4 c + 3
//     group of 4        16c + 4q     16c + 4q+1   16c + 4q+2   16c + 4q+3      of lane q, in both rows
//
// Rounding and selection are those of compress.cu: results are bit-identical to the two steps.
#pragma once

#include "epilogue_hidden.cuh"
#include "epilogue_steps.cuh"
#include "quad.cuh"
#include "select24.cuh"
#include "sparse24/format.h"

namespace sparse24::cuda {

// Arguments as the device sees them.
struct CompressParams {
  HiddenParams hidden;
  Operand a;  // the stored form of the result, metadata included
  void* values;
  uint8_t* meta;
};

// T: the type that h is rounded to. kFp8Values: of the values; otherwise T. kFp8Meta: the layout of the metadata.
template <class T, bool kFp8Values, bool kFp8Meta, int kTileM, int kTileN>
class CompressEpilogue : public HiddenEpilogue<CompressParams, T, kTileM, kTileN, 16, true> {
  using Base = HiddenEpilogue<CompressParams, T, kTileM, kTileN, 16, true>;
  using Base::h_, Base::p_, Base::seen_;
  static_assert(kTileM % kMetaRowPadding == 0, "tiles cover the metadata's padding");

 public:
  using Base::Base;
  using typename Base::Runs, typename Base::Terms;

  template <class Fragment>
  CUTLASS_DEVICE void take(int m, int n, int row, Fragment const& acc, Terms const& terms) {
    row_ = m + row;
    column_ = n;
    if constexpr (kFp8Values) {
      inverse_scale_[0] = terms.rows[row].out_scale;
      inverse_scale_[1] = terms.rows[row + 8].out_scale;
    }
    h_.take(p_.hidden, row, acc, terms);
  }

  template <int kStep, bool kCounts>
  CUTLASS_DEVICE void finish() {
    constexpr int kGroup = kStep % 4;  // of the run
    uint32_t m[4];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 4; ++i) m[i] = magnitudes<T, Activation::kRelu2>(h_.of[2 * kStep + i / 2][i % 2]);
    const KeptPairs kept = keep_two_pairs(m, m);  // squares are taken of magnitudes
    nibbles_ = (kept.nibbles << 4 * kGroup) + (kGroup ? nibbles_ : 0u);
    if constexpr (kFp8Values || kCounts) {
      CUTLASS_PRAGMA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float y[2] = {square(kept.first, half), square(kept.second, half)};
        if (kCounts && exists(half)) {  // the largest of a group is always kept
          seen_.see(y[0], inverse_scale_[half]);
          seen_.see(y[1], inverse_scale_[half]);
        }
        if constexpr (kFp8Values) {
          const uint32_t pair = to_e4m3x2(__fmul_rn(y[0], inverse_scale_[half]), __fmul_rn(y[1], inverse_scale_[half]));
          uint32_t& word = values_[half][kGroup / 2];
          word = kGroup % 2 ? __byte_perm(word, pair, 0x5410) : pair;
        }
      }
    }
    if constexpr (!kFp8Values) {
      const uint32_t first = square2<T>(kept.first), second = square2<T>(kept.second);
      values_[0][kGroup] = __byte_perm(first, second, 0x5410);
      values_[1][kGroup] = __byte_perm(first, second, 0x7632);
    }
    if constexpr (kGroup == 3) {
      constexpr int kFirst = 16 * (kStep - kGroup);  // column of the block
      store_values(column_ + kFirst);
      if constexpr (!kFp8Meta) {
        store_meta_16bit(column_ + kFirst);
      } else if constexpr (kTileN % 128 != 0) {
        store_meta_fp8(column_ + kFirst);
      } else if constexpr (kFirst % 128 == 0) {
        before_ = both_rows();
      } else {
        store_meta_fp8(column_ + kFirst - 64, before_, both_rows());
      }
    }
    this->template collect<kStep, kCounts>();
  }

 private:
  static constexpr uint32_t kPadding = 0x01010101u * kMetaPaddingByte;

  CUTLASS_DEVICE static float square(uint32_t both, int half) {
    const float x = to_float(T{}, uint16_t(half ? both >> 16 : both));
    return __fmul_rn(x, x);
  }

  // Rows beyond the last have metadata too, and are whatever w holds: NaN times their zero is none of theirs.
  CUTLASS_DEVICE bool exists(int half) const { return row_ + 8 * half < p_.hidden.rows; }

  // The kept half of a run, of both rows.
  CUTLASS_DEVICE void store_values(int n) const {
    const int column = n + Runs::kRun * (threadIdx.x & 3);
    if (column >= p_.hidden.cols) return;
    CUTLASS_PRAGMA_UNROLL
    for (int half = 0; half < 2; ++half) {
      if (!exists(half)) continue;
      const int64_t index = (int64_t(row_ + 8 * half) * p_.hidden.cols + column) / 2;
      const uint32_t* w = values_[half];
      if constexpr (kFp8Values) {
        *reinterpret_cast<uint2*>(static_cast<uint8_t*>(p_.values) + index) = make_uint2(w[0], w[1]);
      } else {
        store16(static_cast<T*>(p_.values) + index, w[0], w[1], w[2], w[3]);
      }
    }
  }

  // Those of a run: of row r in the lower half, of row r + 8 in the upper.
  CUTLASS_DEVICE uint32_t both_rows() const {
    const uint32_t lower = exists(0) ? nibbles_ : kPadding, upper = exists(1) ? nibbles_ : kPadding;
    return __byte_perm(lower, upper, 0x7610);
  }

  // Lane q has columns 16 q .. 16 q + 15 of 64, and both rows are neighbours in the 128 bytes that format.h draws.
  CUTLASS_DEVICE void store_meta_16bit(int n) const {
    if (row_ >= p_.a.m_meta || n >= p_.a.k_meta) return;
    const int q = threadIdx.x & 3;
    const int64_t byte = n / 64 * p_.a.m_meta * 8 + row_ / 16 * 128 + (q & 1) * 64 + row_ % 8 * 8 + (q >> 1) * 4;
    *reinterpret_cast<uint32_t*>(p_.meta + byte) = both_rows();
  }

  // fp8: 128 columns of a row are 16 bytes. Two lanes have four bytes of a row together, the even one takes row r.
  CUTLASS_DEVICE uint32_t of_one_row(uint32_t both) const {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, both, 1);
    return threadIdx.x & 1 ? __byte_perm(other, both, 0x7632) : __byte_perm(both, other, 0x5410);
  }
  CUTLASS_DEVICE uint8_t* meta_fp8(int n) const {
    const int64_t row = row_ + 8 * (threadIdx.x & 1);
    return p_.meta + (n / 128 * p_.a.m_meta + row) * 16 + n % 128 / 8;
  }
  // A block of 64 columns, where tiles end in the middle of 128.
  CUTLASS_DEVICE void store_meta_fp8(int n) const {
    const uint32_t w = of_one_row(both_rows());
    if (row_ >= p_.a.m_meta || n >= p_.a.k_meta) return;
    auto* meta = reinterpret_cast<uint32_t*>(meta_fp8(n)) + (threadIdx.x >> 1 & 1);
    meta[0] = w;
    // The second half of the last 128 columns may lie beyond the last tile.
    if (n % 128 == 0 && n + 64 >= p_.a.k) meta[2] = kPadding;
  }
  // Two blocks: the other two lanes of the quad take the second.
  CUTLASS_DEVICE void store_meta_fp8(int n, uint32_t first, uint32_t second) const {
    const bool high = threadIdx.x & 2;
    first = of_one_row(first);
    second = of_one_row(second);
    transpose_pair<2>(first, second, high);
    if (row_ >= p_.a.m_meta || n >= p_.a.k_meta) return;
    *reinterpret_cast<uint2*>(meta_fp8(n) + 8 * high) = make_uint2(first, second);
  }

  int row_ = kNowhere, column_ = 0;  // of the first element of row r
  float inverse_scale_[2] = {};      // 0: y is not scaled
  uint32_t values_[2][kFp8Values ? 2 : 4] = {};
  uint32_t nibbles_ = 0, before_ = 0;
};

}  // namespace sparse24::cuda
