/// @file
/// quantize_fp8_both: a dense matrix to float8 with one scale, in both orders: rows as they are, and transposed,
/// because float8 products want their reduction dimension contiguous in both operands.
#pragma once

#include "sparse24/format.h"
#include "sparse24/packed.h"
#include "sparse24/quantize.h"
#include "sparse24/token_order.h"

namespace sparse24 {

/// q [rows, cols] = e4m3(x * (1 / scale)), rounded once, saturating, and qt [cols, ld_qt] its transpose; x row-major
/// and contiguous, cols % 16 == 0 on the GPU. The column r of qt is row `interleaved_token(r, quarter())` of x; columns
/// from `rows` to ld_qt are zeros. With a `count` all are that many matrices, one behind the other, with scales of
/// their own.
struct QuantizeBothArgs {
  const void* x;
  DType x_dtype;
  int64_t rows, cols;
  bool interleaved;
  void *q, *qt;
  const float* given_scale;  ///< [count], counts as `usable_scale`; null: max |x| / 448 as in `CompressArgs`
  float* scale;              ///< [count]: what was used
  float* amax;               ///< [count], zero before the call: max |x|, NaN not counted
  int64_t count = 1;         ///< on the GPU at most 65,535; one where x is pruned
  /// x is pruned to two of four along `dim` before it is rounded, by the rule of compress; not with `interleaved`.
  bool prunes = false;
  Dim dim = Dim::kFeatures;
  /// Not null: x is a weight, and q and this are the values and the metadata of what is pruned of it, as an operand.
  /// With kFeatures that has its rows in the order of `packed_feature`: rows % 16 == 0, cols % 32 == 0. With kTokens it
  /// has its columns in their own order, and qt the codes [rows, cols] as they lie: rows % 32 == 0, cols % 16 == 0.
  uint8_t* meta = nullptr;

  SPARSE24_HD int64_t quarter() const { return interleaved ? rows / 4 : 0; }
  SPARSE24_HD Operand packed() const {
    const bool features = dim == Dim::kFeatures;
    return Operand::of(features ? rows : cols, features ? cols : rows, DType::kFloat8E4M3, Dim::kFeatures);
  }
  /// As many columns as a float8 operand along tokens has.
  SPARSE24_HD int64_t ld_qt() const { return round_up(rows, token_padding(DType::kFloat8E4M3)); }
  /// The matrix `i` of `count`; elements of x have `bytes`.
  SPARSE24_HD QuantizeBothArgs matrix(int64_t i, int64_t bytes) const {
    QuantizeBothArgs one = *this;
    one.x = static_cast<const char*>(x) + i * rows * cols * bytes;
    one.q = static_cast<char*>(q) + i * rows * cols;
    one.qt = static_cast<char*>(qt) + i * cols * ld_qt();
    one.given_scale = given_scale ? given_scale + i : nullptr;
    one.scale = scale + i;
    one.amax = amax + i;
    one.count = 1;
    return one;
  }
};

/// qt [cols, ld_qt] = the transpose of codes q [rows, cols], in the order and with the padding of `QuantizeBothArgs`
/// without `interleaved`; q row-major and contiguous, cols % 16 == 0 on the GPU.
struct TransposeFp8Args {
  const void* q;
  int64_t rows, cols;
  void* qt;

  SPARSE24_HD int64_t ld_qt() const { return round_up(rows, token_padding(DType::kFloat8E4M3)); }
};

namespace cpu {
void quantize_fp8_both(const QuantizeBothArgs& args);
void transpose_fp8(const TransposeFp8Args& args);
}  // namespace cpu
namespace cuda {
void quantize_fp8_both(const QuantizeBothArgs& args, cudaStream_t stream);
void transpose_fp8(const TransposeFp8Args& args, cudaStream_t stream);
}  // namespace cuda

}  // namespace sparse24
