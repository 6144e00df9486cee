/// @file
/// compress, compress_fp8, compress_like, decompress: between a dense X [rows, cols] and its 2:4 form.
///
/// The functions of `cpu` and `cuda` are bit-identical. They trust their arguments: sizes and alignment are the
/// caller's to check (cpp/torch does), buffers have the sizes of `Operand::of(rows, cols, values dtype, dim)`.
#pragma once

#include "sparse24/activation.h"
#include "sparse24/format.h"

namespace sparse24 {

/// X [rows, cols], row-major and contiguous, to values and meta.
///
/// Y = activation(X) in fp32. Each group of four keeps its two largest |Y|, compared before squaring (which keeps the
/// order, but for underflow); NaN counts as larger than everything and of equals the lower index wins. 16-bit values
/// are Y rounded once (X's own bits where the activation is none or relu). fp8 values are e4m3(Y * (1 / scale)),
/// rounded once, saturating.
struct CompressArgs {
  const void* x;
  DType x_dtype;
  int64_t rows, cols;
  Dim dim;
  ActivationArgs activation;
  DType values_dtype;  ///< x_dtype, or kFloat8E4M3
  void* values;
  uint8_t* meta;

  // fp8 only
  Scaling scaling = Scaling::kRow;     ///< elements of `scale`: one, or one per row of A
  const float* given_scale = nullptr;  ///< counts as `usable_scale` (quantize.h)
  /// Where the scale is written if none is given: max |Y| / 448 over its row of A or over all of X, at least the
  /// smallest normal float; 1 where everything is zero. NaN does not count.
  float* computed_scale = nullptr;
};

/// values = X gathered at a known pattern.
struct CompressLikeArgs {
  const void* x;
  DType dtype;
  int64_t rows, cols;
  Dim dim;
  const uint8_t* meta;
  void* values;
};

/// X from values and meta, zeros elsewhere.
struct DecompressArgs {
  const void* values;
  const uint8_t* meta;
  DType dtype;
  int64_t rows, cols;
  Dim dim;
  void* x;
};

namespace cpu {
void compress(const CompressArgs& args);
void compress_like(const CompressLikeArgs& args);
void decompress(const DecompressArgs& args);
}  // namespace cpu

namespace cuda {
void compress(const CompressArgs& args, cudaStream_t stream);
void compress_like(const CompressLikeArgs& args, cudaStream_t stream);
void decompress(const DecompressArgs& args, cudaStream_t stream);
}  // namespace cuda

}  // namespace sparse24
