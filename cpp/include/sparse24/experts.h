/// @file
/// Products of many experts at once: rows are sorted by expert, and each expert has a weight of its own.
///
///     rows       0 ... | offsets[0] ... | offsets[1] ...     | offsets[E - 1] ...
///     weight     w[0]  | w[1]           | w[2] ...           | none: rows of no expert
///
/// Offsets are data on the device. No launch depends on them, so that calls can be captured in a CUDA graph. Offsets
/// that do not ascend, or that leave the rows, count as the largest before them, or as the number of rows.
///
/// A 2:4 activation of experts is one operand of `padded_rows()` rows, in which each expert begins at a multiple of
/// 128, as the metadata wants it:
///
///     rows of x       0 1 2 ... 129 | 130 | 131 ...                (experts of 130 rows and of 1)
///     padded rows     0 1 2 ... 129 ... 255 | 256 ... 383 | 384 ...
///
/// Padding is in no result: its values are not written, nor what lies behind the last expert.
#pragma once

#include <algorithm>
#include <cstdint>

#include "sparse24/format.h"
#include "sparse24/linear.h"

namespace sparse24 {

/// What a multiprocessor keeps a table of.
inline constexpr int64_t kMostExperts = 1024;
inline constexpr int kExpertRows = int(kMetaRowPadding);  ///< of a tile; one belongs to one expert

/// Whose rows are whose.
struct Experts {
  int64_t count;           ///< 1 to kMostExperts
  int64_t rows;            ///< of x, those of no expert included
  const int32_t* offsets;  ///< [count]: where each expert's rows end

  /// As many rows as the padded ones can be: each expert that has rows has at most one tile that is not full.
  static constexpr int64_t padded_rows(int64_t rows, int64_t count) {
    return (rows / kExpertRows + std::min(rows, count)) * kExpertRows;
  }
  constexpr int64_t padded_rows() const { return padded_rows(rows, count); }
};

/// linear_relu2 with w [count, out, in]. `scale_w_per_row`: [count, out], else [count]. No bias, no statistics.
struct ExpertsLinearRelu2Args {
  LinearRelu2Args of;
  Experts experts;
};

/// linear_compress likewise, to an operand of `padded_rows()` rows.
struct ExpertsLinearCompressArgs {
  LinearCompressArgs of;
  Experts experts;
};

/// What both second products have in common: d [rows, out] = row_scale * scale_a * scale_w * (a @ w[expert].T), zeros
/// in the rows of no expert. Sums are in fp32 and rounded once.
struct ExpertsProduct {
  Experts experts;
  int64_t in, out;
  DType dtype;                     ///< of a and w
  const void* w;                   ///< [count, out, in]
  Major w_major = Major::kColumn;  ///< kRow: [count, in, out], for the sparse product in 16 bits
  void* d;
  DType d_dtype;  ///< 16 bits on the GPU

  const float* scale_a = nullptr;    ///< null: 1
  bool scale_a_per_row = false;      ///< of a, which has padded rows where it is sparse; else one element
  const float* scale_w = nullptr;    ///< null: 1
  bool scale_w_per_row = false;      ///< [count, out], else [count]
  const float* row_scale = nullptr;  ///< [rows], null: 1
};

/// The dense product: x [rows, in].
struct ExpertsLinearArgs {
  ExpertsProduct of;
  const void* x;
};

/// The sparse product: `Operand::of(padded_rows(), in, dtype, Dim::kFeatures)`, as linear_compress of experts makes it.
struct ExpertsMmArgs {
  ExpertsProduct of;
  const void* values;
  const uint8_t* meta;
};

/// linear_gradient of experts: dy = grad @ w[expert] where the forward pass kept y, and what follows from it. Matrices
/// are of `dtype`; dy is rounded before it is multiplied.
///
///     dh = row_scale * dy * 2 sqrt(y)      products[row] = sum of y * dy
///
/// Where `dtype` is float8, so are grad, w and y, with scales, and metadata has the layout of fp8; results and dy are
/// bfloat16, and so is y before it is multiplied.
///
/// Rows of no expert get products of zero, and nothing else.
struct ExpertsLinearGradientArgs {
  Experts experts;
  int64_t in, features;  ///< columns of grad, and of dh
  DType dtype;
  const void* grad;                  ///< [rows, in]
  const void* w;                     ///< [count, in, features]; float8: [count, features, in]
  const void* values;                ///< y as linear_compress of experts stored it
  const uint8_t* meta;               ///< that of y and of dh
  const float* row_scale = nullptr;  ///< [rows], null: 1
  void* dh;                          ///< as `values`
  void* dh_dense = nullptr;          ///< [rows, features]; null: neither is wanted
  void* y_dense = nullptr;           ///< row_scale * y, rounded once more
  float* products = nullptr;         ///< [rows]; on the GPU [product_parts(features), rows], to be added up

  const float* scale_grad = nullptr;  ///< float8, null: 1
  bool scale_grad_per_row = false;    ///< else one element
  const float* scale_w = nullptr;     ///< float8, null: 1
  bool scale_w_per_row = false;       ///< [count, features], else [count]
  const float* scale_y = nullptr;     ///< float8, null: 1; [padded_rows()]

  constexpr DType result() const { return dtype == DType::kFloat8E4M3 ? DType::kBFloat16 : dtype; }
  static constexpr int kTileColumns = 192;  ///< of the kernels
  static constexpr int64_t product_parts(int64_t features) { return ceil_div(features, kTileColumns); }
};

/// A product over the rows of each expert: d [count, m, n] = a_e.T @ b_e, zeros where an expert has no rows. Sums are
/// in fp32 and rounded once; rows of other experts, or of none, are in no sum, whatever they hold.
struct ExpertsWeightGradientArgs {
  Experts experts;
  int64_t m, n;
  DType dtype;
  const void* a;  ///< [rows, m]
  const void* b;  ///< [rows, n]
  void* d;
};

namespace cpu {
void experts_weight_gradient(const ExpertsWeightGradientArgs& args);
void experts_linear_gradient(const ExpertsLinearGradientArgs& args);
void experts_linear_relu2(const ExpertsLinearRelu2Args& args);
void experts_linear_compress(const ExpertsLinearCompressArgs& args);
void experts_linear(const ExpertsLinearArgs& args);
void experts_mm(const ExpertsMmArgs& args);
}  // namespace cpu

namespace cuda {
void experts_weight_gradient(const ExpertsWeightGradientArgs& args, cudaStream_t stream);
void experts_linear_gradient(const ExpertsLinearGradientArgs& args, cudaStream_t stream);
void experts_linear_relu2(const ExpertsLinearRelu2Args& args, cudaStream_t stream);
void experts_linear_compress(const ExpertsLinearCompressArgs& args, cudaStream_t stream);
void experts_linear(const ExpertsLinearArgs& args, cudaStream_t stream);
void experts_mm(const ExpertsMmArgs& args, cudaStream_t stream);
}  // namespace cuda

}  // namespace sparse24
