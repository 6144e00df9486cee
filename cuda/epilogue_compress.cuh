// The epilogue of linear_compress: activation, two of four and metadata, straight from the accumulators.
//
// In the fragment of epilogue_steps.cuh lanes (0, 1) and (2, 3) of a quad share a group of four columns of two rows.
// One exchange of rounded pre-activations gives each lane one whole group: even lanes that of row r, odd lanes that of
// row r + 8, q / 2 saying which half of the block. Everything after that is local to the lane, or between it and one
// neighbour:
//
//     lane q of a quad     row              groups of block b
//     0, 2                 r                2b, 2b + 1
//     1, 3                 r + 8            2b, 2b + 1
//
// Rounding and selection are those of compress.cu, by the same code: results are bit-identical to the two steps.
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
class CompressEpilogue : public HiddenEpilogue<CompressParams, T, kTileM, kTileN> {
  using Base = HiddenEpilogue<CompressParams, T, kTileM, kTileN>;
  using Base::h_, Base::p_, Base::seen_;
  static_assert(kTileM % kMetaRowPadding == 0, "tiles cover the metadata's padding");

 public:
  using Base::Base;
  using typename Base::Terms;

  template <class Fragment>
  CUTLASS_DEVICE void take(int m, int n, int row, Fragment const& acc, Terms const& terms) {
    const int lower = 8 * (threadIdx.x & 1);
    row_ = m + row + lower;
    column_ = n;
    if constexpr (kFp8Values) inverse_scale_ = terms.rows[row + lower].out_scale;
    h_.take(p_.hidden, row, acc, terms);
  }

  template <int kStep, bool kCounts>
  CUTLASS_DEVICE void finish() {
    const int q = threadIdx.x & 3;
    CUTLASS_PRAGMA_UNROLL
    for (int b = 2 * kStep; b < 2 * kStep + 2; ++b) {
      uint32_t x01 = h_.of[b][0], x23 = h_.of[b][1];
      transpose_pair<1>(x01, x23, q & 1);
      const Group<T, Activation::kRelu2> group(x01, x23);
      if (kCounts && exists()) {  // the largest of a group is always kept
        seen_.see(group.y(0), inverse_scale_);
        seen_.see(group.y(1), inverse_scale_);
      }
      kept_[b % kPerStore] = kFp8Values ? group.kept_e4m3(inverse_scale_) : group.kept_16bit();
      const uint32_t complement = group.kept.complement << (8 * (b % 4) + 4 * (q >> 1));
      complements_[b % kAtom / 4] = complement + (b % 4 ? complements_[b % kAtom / 4] : 0u);
      if ((b + 1) % kPerStore == 0) store_values(column_ + 8 * (b + 1 - kPerStore), q);
      if ((b + 1) % kAtom == 0) store_meta(column_ + 8 * (b + 1 - kAtom), q);
    }
    this->template collect<kStep, kCounts>();
  }

 private:
  static constexpr int kAtom = kFp8Meta && kTileN % 128 == 0 ? 16 : 8;  // blocks whose metadata is stored at once
  static constexpr int kPerStore = kFp8Values ? 8 : 4;                  // blocks whose values fill 2 x 16 bytes
  static_assert(kTileN / 8 % kAtom == 0, "whole atoms");
  static constexpr uint32_t kPadding = 0x01010101u * kMetaPaddingByte;

  // Rows beyond the last have metadata too, and are whatever w holds: NaN times their zero is none of theirs.
  CUTLASS_DEVICE bool exists() const { return row_ < p_.hidden.rows; }

  // kept_[b]: the kept pair of group 2b + (q >> 1). Lanes q and q ^ 2 share a row: after trading halves each holds the
  // neighbouring pairs of 16 bytes.
  CUTLASS_DEVICE void store_values(int n, int q) const {
    const bool high = q >> 1;
    uint32_t w[4];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 2; ++i) {
      uint32_t halves[2];  // groups 2b and 2b + 1 after the exchange; fp8 pairs of two blocks share a word
      CUTLASS_PRAGMA_UNROLL
      for (int lane = 0; lane < 2; ++lane) {
        const int b = kFp8Values ? 4 * lane + 2 * i : 2 * lane + i;
        halves[lane] = kFp8Values ? pack16(uint16_t(kept_[b]), uint16_t(kept_[b + 1])) : kept_[b];
      }
      transpose_pair<2>(halves[0], halves[1], high);
      w[2 * i] = kFp8Values ? __byte_perm(halves[0], halves[1], 0x5410) : halves[0];
      w[2 * i + 1] = kFp8Values ? __byte_perm(halves[0], halves[1], 0x7632) : halves[1];
    }
    constexpr int kColumns = kPerStore * 4;  // of one lane's 16 bytes
    const int column = n + kColumns * high;
    if (row_ < p_.a.m && column < p_.a.k) {
      const int64_t index = (row_ * p_.a.k + column) / 2;
      store16(static_cast<char*>(p_.values) + index * (kFp8Values ? 1 : 2), w[0], w[1], w[2], w[3]);
    }
  }

  // complements_[i]: 15 - nibble of 32 columns, this lane's half of each block; lanes q and q ^ 2 complete each other.
  CUTLASS_DEVICE void store_meta(int n, int q) const {
    uint32_t nibbles[kAtom / 4];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kAtom / 4; ++i) {
      nibbles[i] = ~(complements_[i] | __shfl_xor_sync(0xffffffffu, complements_[i], 2));
      if (!exists()) nibbles[i] = kPadding;
    }
    const bool covered = row_ < p_.a.m_meta && n < p_.a.k_meta && q < 2;
    if constexpr (kFp8Meta) {
      uint8_t* meta = p_.meta + (n / 128 * p_.a.m_meta + row_) * 16 + n % 128 / 8;
      if constexpr (kAtom == 16) {
        if (covered) store16(meta, nibbles[0], nibbles[1], nibbles[2], nibbles[3]);
      } else if (covered) {
        *reinterpret_cast<uint2*>(meta) = make_uint2(nibbles[0], nibbles[1]);
        // The second half of the last 128 columns may lie beyond the last tile.
        if (n % 128 == 0 && n + 64 >= p_.a.k) *reinterpret_cast<uint2*>(meta + 8) = make_uint2(kPadding, kPadding);
      }
    } else {
      // Even lanes store k0 and k2 of both rows, odd lanes k1 and k3: 8 of the 128 bytes that format.h draws.
      const bool odd = q & 1;
      uint32_t upper = __byte_perm(nibbles[0], nibbles[1], 0x5410),
               lower = __byte_perm(nibbles[0], nibbles[1], 0x7632);  // k0 and k2, k1 and k3; then rows r, r + 8
      transpose_pair<1>(upper, lower, odd);
      if (covered) {
        const int64_t byte = n / 64 * p_.a.m_meta * 8 + row_ / 16 * 128 + odd * 64 + row_ % 8 * 8;
        *reinterpret_cast<uint2*>(p_.meta + byte) =
            make_uint2(__byte_perm(upper, lower, 0x5410), __byte_perm(upper, lower, 0x7632));
      }
    }
  }

  int64_t row_ = kNowhere;  // the one that this lane selects for
  int column_ = 0;
  float inverse_scale_ = 0.f;
  uint32_t kept_[kPerStore] = {};
  uint32_t complements_[kAtom / 4] = {};
};

}  // namespace sparse24::cuda
