// The epilogue of linear_compress: activation, two of four and metadata, straight from the accumulators.
//
// A lane's runs are 16 features of rows r and r + 8 (epilogues/permuted_n.cuh), four groups each, so that nothing is
// exchanged but metadata. The same group of both rows is selected at once:
//
//     step              4 c          4 c + 1      4 c + 2      4 c + 3
//     group of 4        16c + 4q     16c + 4q+1   16c + 4q+2   16c + 4q+3      of lane q, in both rows
//
// Rounding and selection are those of elementwise/compress.cu: results are bit-identical to the two steps.
#pragma once

#include "common/float8.cuh"
#include "common/packed.cuh"
#include "common/warp.cuh"
#include "gemm/sm90/epilogues/linear.cuh"
#include "gemm/sm90/epilogues/steps.cuh"
#include "sparse24/format.h"
#include "sparsity/select24.cuh"

namespace sparse24::cuda {

// LinearCompressArgs as the device sees them.
struct CompressParams {
  LinearParams linear;
  Operand a;  // the stored form of the result, metadata included
  void* values;
  uint8_t* meta;
};

// h is rounded to T. Values are e4m3 with kFp8Values, and T without; kFp8Meta gives the metadata the layout of fp8.
template <class T, bool kFp8Values, bool kFp8Meta, int kTileM, int kTileN>
class CompressEpilogue : public LinearEpilogue<CompressParams, T, kTileM, kTileN, 16, true> {
  using Base = LinearEpilogue<CompressParams, T, kTileM, kTileN, 16, true>;
  using Base::h_, Base::inverse_scale_, Base::p_, Base::seen_;
  static_assert(kTileM % kMetaRowPadding == 0, "tiles cover the metadata's padding");

 public:
  using Base::Base;
  template <int kColumns>
  using WithColumns = CompressEpilogue<T, kFp8Values, kFp8Meta, kTileM, kColumns>;

  template <class Fragment, class Scales>
  CUTLASS_DEVICE void begin(int m, int n, Fragment const& acc, Scales& scales) {
    begin(m, n, p_.linear.rows, acc, scales);
    this->see_largest();
  }
  // rows: where those of h end. Of them no statistics are wanted.
  template <class Fragment, class Scales>
  CUTLASS_DEVICE void begin(int m, int n, int rows, Fragment const& acc, Scales& scales) {
    values_ = static_cast<char*>(p_.values) + this->template locate<kFp8Values>(m, n, rows, scales) / 2 * kBytes;
    place_meta(m + scales.row, n, rows);
    h_.take(p_.linear, acc, scales);
  }
  // Makes visits store nothing.
  CUTLASS_DEVICE void forget() {
    Base::forget();
    meta_left_ = 0;
  }

  template <int kStep, bool kGeneral>
  CUTLASS_DEVICE void visit() {
    constexpr int kGroup = kStep % 4, kFirst = 16 * (kStep - kGroup);  // in the run; first column of the block
    uint32_t m[4];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 4; ++i) m[i] = h_.of[2 * kStep + i / 2][i % 2];
    const KeptPairs kept = keep_two_pairs(m, m);
    constexpr uint32_t kBefore = 0x00010001u * ((1u << 4 * kGroup) - 1);
    nibbles_ = (nibbles_ & kBefore) | (kept.nibbles & ~kBefore);
    if constexpr (kFp8Values || kGeneral) {
      CUTLASS_PRAGMA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float y[2] = {this->template activated<kGeneral>(kept.first, half),
                            this->template activated<kGeneral>(kept.second, half)},
                    inverse = inverse_scale_[half];
        if (kGeneral && this->exists(kFirst, half)) {  // the largest of a group is always kept
          seen_.see(y[0], inverse);
          seen_.see(y[1], inverse);
        }
        if constexpr (kFp8Values) {
          const uint16_t pair = to_e4m3x2(__fmul_rn(y[0], inverse), __fmul_rn(y[1], inverse));
          if constexpr (kGroup % 2 == 0) {
            even_[half] = pair;
          } else {
            kept_[half][kGroup / 2] = pack16(even_[half], pair);
          }
        }
      }
    }
    if constexpr (!kFp8Values) {
      const uint32_t first = this->template activated2<kGeneral>(kept.first),
                     second = this->template activated2<kGeneral>(kept.second);
      kept_[0][kGroup] = __byte_perm(first, second, 0x5410);
      kept_[1][kGroup] = __byte_perm(first, second, 0x7632);
    }
    if constexpr (kGroup == 3) {
      store_values<kFirst>();
      store_meta<kFirst>();
    }
    this->template collect<kStep>();
  }

 private:
  static constexpr int kBytes = kFp8Values ? 1 : 2;
  static constexpr uint32_t kPadding = 0x01010101u * kMetaPaddingByte;
  // fp8 metadata has 16 bytes for 128 columns of a row: stored at once, or by halves where tiles end in their middle.
  static constexpr bool kWholeAtoms = kTileN % 128 == 0;

  // Stores the kept half of a run, of both rows.
  template <int kFirst>
  CUTLASS_DEVICE void store_values() const {
    CUTLASS_PRAGMA_UNROLL
    for (int half = 0; half < 2; ++half) {
      if (!this->exists(kFirst, half)) continue;
      char* to = values_ + (kFirst + uint64_t(8 * half) * uint32_t(p_.linear.cols)) / 2 * kBytes;
      const uint32_t* w = kept_[half];
      if constexpr (kFp8Values) {
        *reinterpret_cast<uint2*>(to) = make_uint2(w[0], w[1]);
      } else {
        store16(to, w[0], w[1], w[2], w[3]);
      }
    }
  }

  // Finds the place of the metadata, once for all blocks of the tile. In 16 bits lane q has columns 16 q .. 16 q + 15
  // of 64, and both rows are neighbours in the 128 bytes that format.h draws. In fp8 two lanes have four bytes of a row
  // together, of which the even one takes row r.
  CUTLASS_DEVICE void place_meta(int row, int n, int rows) {
    const int q = threadIdx.x & 3;
    present_ = (row < rows ? 0xffffu : 0u) | (row + 8 < rows ? 0xffff0000u : 0u);
    meta_left_ = row < p_.a.m_meta ? int(p_.a.k_meta) - n : 0;
    if constexpr (kFp8Meta) {
      const int in_quad = kWholeAtoms ? 8 * (q >> 1) : 4 * (q >> 1) + n % 128 / 8;
      meta_ = p_.meta + (uint64_t(n / 128) * p_.a.m_meta + row + 8 * (q & 1)) * 16 + in_quad;
      in_atom_ = n % 128;
      // The second half of the last 128 columns may lie beyond the last tile.
      padded_ = p_.a.k_meta - p_.a.k >= 64 ? int(p_.a.k_meta) - 128 - n : -1;
    } else {
      meta_ = p_.meta + uint64_t(n / 64) * p_.a.m_meta * 8 + row / 16 * 128 + (q & 1) * 64 + row % 8 * 8 + (q >> 1) * 4;
    }
  }

  template <int kFirst>
  CUTLASS_DEVICE void store_meta() {
    // A run's nibbles are those of row r in the lower half and of row r + 8 in the upper.
    const uint32_t both = (nibbles_ & present_) | (kPadding & ~present_);
    if constexpr (!kFp8Meta) {
      if (kFirst < meta_left_) *reinterpret_cast<uint32_t*>(meta_ + atoms(kFirst / 64, 8)) = both;
    } else if constexpr (!kWholeAtoms) {
      const uint32_t w = of_one_row(both);
      // 64 columns further is the other half of the atom, or a half of the next.
      const uint64_t odd = kFirst % 128 == 0 ? 0 : in_atom_ ? atoms(1, 16) - 8 : 8;
      uint8_t* to = meta_ + atoms(kFirst / 128, 16) + odd;
      if (kFirst < meta_left_) *reinterpret_cast<uint32_t*>(to) = w;
      if (kFirst < meta_left_ && kFirst == padded_) *reinterpret_cast<uint32_t*>(to + 8) = kPadding;
    } else if constexpr (kFirst % 128 == 0) {
      before_ = both;
    } else {
      // Two blocks are complete; the other two lanes of the quad take the second.
      uint32_t first = of_one_row(before_), second = of_one_row(both);
      transpose_pair<2>(first, second, threadIdx.x & 2);
      if (kFirst - 64 < meta_left_)
        *reinterpret_cast<uint2*>(meta_ + atoms(kFirst / 128, 16)) = make_uint2(first, second);
    }
  }
  CUTLASS_DEVICE uint64_t atoms(int count, int bytes_of_row) const {
    return uint64_t(uint32_t(count * bytes_of_row)) * uint32_t(p_.a.m_meta);
  }
  CUTLASS_DEVICE static uint32_t of_one_row(uint32_t both) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, both, 1);
    return threadIdx.x & 1 ? __byte_perm(other, both, 0x7632) : __byte_perm(both, other, 0x5410);
  }

  char* values_ = nullptr;  // where the run of row r in the tile's first block lies
  uint8_t* meta_ = nullptr;
  int meta_left_ = 0;      // columns of metadata from the tile's first on
  int in_atom_ = 0;        // where the tile begins in 128 columns
  int padded_ = -1;        // the block whose atom has no second half
  uint32_t present_ = 0;   // a mask of the rows that exist
  uint16_t even_[2] = {};  // a pair whose word is not complete
  uint32_t kept_[2][kFp8Values ? 2 : 4] = {};
  uint32_t nibbles_ = 0, before_ = 0;
};

}  // namespace sparse24::cuda
