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
/// from `rows` to ld_qt are zeros.
struct QuantizeBothArgs {
  const void* x;
  DType x_dtype;
  int64_t rows, cols;
  bool interleaved;
  void *q, *qt;
  const float* given_scale;  ///< one element, counts as `usable_scale`; null: max |x| / 448 as in `CompressArgs`
  float* scale;              ///< one element: what was used
  float* amax;               ///< one element, zero before the call: max |x|, NaN not counted
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
  int64_t ld_qt() const { return round_up(rows, token_padding(DType::kFloat8E4M3)); }
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
