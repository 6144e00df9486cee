/// @file
/// The 2:4 format: sizes, alignment and the only index functions of values and metadata.
///
/// `compress` sees X [R, C] as the sparse operand A [M, K] of a GEMM:
///
///     dim = -1 (features):  A = X,    M = R, K = C,  group g of row r    = X[r, 4g .. 4g+3]
///     dim = -2 (tokens):    A = X.T,  M = C, K = R,  group g of column c = X[4g .. 4g+3, c]
///
/// Each group keeps two values, i0 < i1, and the nibble `i0 | i1 << 2`: always an ordered pair, because the
/// hardware leaves the other codes undefined. Metadata is padded to M % 128 and K % atom with nibble 4 = (0, 1).
///
/// Metadata from elsewhere can hold any nibble. Functions that read it stay inside of their buffers, and those that
/// decode it (decompress, compress_like, gather_features, feature_counts, linear_gradient) follow one rule: the first
/// value of a group lies at i0, the second at i1, and if both lie at the same place the first counts. mm is for
/// metadata that compress made: the hardware does not define what other codes do. Padding is never decoded, and values
/// that belong to tokens of the padding are never read.
///
/// Values (kept value j of row m, j = 2g or 2g + 1):
///
///     16-bit, features   [R, C/2]              m * C/2 + j
///     16-bit, tokens     [up(R,4)/2, C]        j * C + m            (A is MN-major: no transpose anywhere)
///     fp8,    features   [R, C/2]              m * C/2 + j
///     fp8,    tokens     [C, up(R,32)/2]       m * up(R,32)/2 + j   (fp8 operands must be K-major)
///
/// Metadata, fp8 (atom 64 x 128): one K block of 128 after the other, in each M rows of 16 bytes, natural order.
///
/// Metadata, 16-bit (atom 64 x 64, 512 bytes; K blocks outermost, then M blocks of 64):
///
///     byte   0        2         4        6         8            64                  128
///            r=0 k0   r=8 k0    r=0 k2   r=8 k2    r=1 .. r=7   the same, k1, k3    rows 16 .. 31, 32 .. 47, ...
///
/// where kb = 16 columns 16b .. 16b+15 of the row = four nibbles = two bytes.
///
/// Source: CUTLASS 4.2 Sm90GemmSparseConfig (tests/cpp/host/test_format_cutlass.cu compares them group by group);
/// PTX ISA 9.7.15.6 for the codes.
#pragma once

#include <cstdint>

#include "sparse24/types.h"

namespace sparse24 {

/// M is padded to the coarsest granularity of any architecture, so that bytes stay valid on later ones.
inline constexpr int64_t kMetaRowPadding = 128;
/// Two nibbles of groups that keep (0, 1), as those of the padding and of zeros do.
inline constexpr uint8_t kMetaPaddingByte = 0x44;

/// K extent of one metadata atom: the K tile of the GEMM kernels.
SPARSE24_HD constexpr int64_t meta_atom_k(DType values) { return values == DType::kFloat8E4M3 ? 128 : 64; }

/// Multiple that C must have for dim = -1, so that a row of values is 16-byte aligned.
SPARSE24_HD constexpr int64_t feature_alignment(DType values, Dim dim) {
  if (dim == Dim::kTokens) return 8;
  return values == DType::kFloat8E4M3 ? 32 : 16;
}

/// Multiple to which tokens are padded with zeros for dim = -2.
SPARSE24_HD constexpr int64_t token_padding(DType values) { return values == DType::kFloat8E4M3 ? 32 : 4; }

/// The sparse operand A [m, k] that X [rows, cols] becomes, and the sizes of what is stored for it.
struct Operand {
  DType dtype;  ///< of the values
  Dim dim;
  int64_t m, k;            ///< logical
  int64_t k_values;        ///< k padded as the values are
  int64_t m_meta, k_meta;  ///< padded as the metadata is

  SPARSE24_HD static constexpr Operand of(int64_t rows, int64_t cols, DType values, Dim dim) {
    const bool features = dim == Dim::kFeatures;
    const int64_t m = features ? rows : cols;
    const int64_t k = features ? cols : rows;
    return {values,
            dim,
            m,
            k,
            features ? k : round_up(k, token_padding(values)),
            round_up(m, kMetaRowPadding),
            round_up(k, meta_atom_k(values))};
  }

  /// Tells whether values are stored as [k_values / 2, m], with pairs of tokens outermost.
  SPARSE24_HD constexpr bool m_contiguous() const { return dim == Dim::kTokens && dtype != DType::kFloat8E4M3; }
  SPARSE24_HD constexpr int64_t values_rows() const { return m_contiguous() ? k_values / 2 : m; }
  SPARSE24_HD constexpr int64_t values_cols() const { return m_contiguous() ? m : k_values / 2; }
  /// Returns how many values of a row of A do not belong to tokens of the padding.
  SPARSE24_HD constexpr int64_t kept() const { return k / 4 * 2 + (k % 4 < 2 ? k % 4 : 2); }
  SPARSE24_HD constexpr int64_t meta_bytes() const { return m_meta * k_meta / 8; }

  /// Returns the index of kept value j of row m in the values.
  SPARSE24_HD constexpr int64_t value_index(int64_t row, int64_t j) const {
    return m_contiguous() ? j * m + row : row * (k_values / 2) + j;
  }

  /// Returns the byte of the metadata that holds the nibble of group g of row m; the low nibble belongs to even g.
  SPARSE24_HD constexpr int64_t meta_byte(int64_t row, int64_t g) const {
    const int64_t col = 4 * g;
    if (dtype == DType::kFloat8E4M3) return (col / 128) * m_meta * 16 + row * 16 + (col % 128) / 8;
    return (col / 64) * m_meta * 8   // K block of 64
           + (row / 16) * 128        // 16 rows
           + ((col % 32) / 16) * 64  // k0, k2 | k1, k3
           + (row % 8) * 8           //
           + ((col % 64) / 32) * 4   // k0 | k2
           + ((row % 16) / 8) * 2    // r | r + 8
           + (col % 16) / 8;
  }
  SPARSE24_HD static constexpr int meta_shift(int64_t g) { return g % 2 ? 4 : 0; }
};

}  // namespace sparse24
