/// @file
/// quantize_fp8: the dense counterpart of compress_fp8, for the operands that stay dense (x and the weights), and the
/// scales that are divided by.
#pragma once

#include <cfloat>
#include <limits>

#include "sparse24/types.h"

namespace sparse24 {

/// What is divided by where this scale is given. A magnitude below the smallest normal float, which `amax / 448` of
/// zeros is, counts as that, as it does where scales are computed: its inverse is finite. Every other scale counts as
/// it is: a negative one turns the signs of what is stored, and with NaN or an infinity the row decodes to NaN.
SPARSE24_HD constexpr float usable_scale(float given) { return -FLT_MIN < given && given < FLT_MIN ? FLT_MIN : given; }

/// Computes used[i] = usable_scale(given[i]), which an op returns for a given scale.
struct UsableScalesArgs {
  const float* given;
  int64_t count;
  float* used;
};

/// q [rows, cols] = e4m3(x * (1 / scale)), rounded once, saturating; x row-major and contiguous, cols % 16 == 0 on the
/// GPU. Scales as in `CompressArgs`: given, or computed per row or for all of x.
struct QuantizeArgs {
  const void* x;
  DType x_dtype;
  int64_t rows, cols;
  void* q;
  Scaling scaling = Scaling::kRow;
  const float* given_scale = nullptr;  ///< counts as `usable_scale`
  float* computed_scale = nullptr;

  /// With both: predicted[r] = factor * |row r of q * scale|^2, and 1 where that is 0: the scale of squares of products
  /// with x, without knowing them. Row scales only. The squares are added exactly, as integers.
  const float* factor = nullptr;  ///< one element
  float* predicted = nullptr;     ///< [rows]
};

/// The magnitude of an e4m3 code as a multiple of its smallest number, 2^-9. NaN counts as 480.
constexpr int e4m3_units(uint8_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  return exponent == 0 ? mantissa : (8 + mantissa) << (exponent - 1);
}

/// factor * |row|^2 of a row whose codes have `squares` as the sum of their squared units; not below the smallest
/// normal number, so that its inverse is finite. NaN, as infinity times a factor of zero is, has one code: processors
/// differ in the one that their products have.
constexpr float predicted_scale(int64_t squares, float scale, float factor) {
  if (squares == 0) return 1.0f;
  const float norm = static_cast<float>(squares) * 0x1p-18f * scale * scale;
  const float predicted = norm * factor;
  if (predicted != predicted) return std::numeric_limits<float>::quiet_NaN();
  return predicted < FLT_MIN ? FLT_MIN : predicted;
}

namespace cpu {
void quantize_fp8(const QuantizeArgs& args);
void usable_scales(const UsableScalesArgs& args);
}  // namespace cpu
namespace cuda {
void quantize_fp8(const QuantizeArgs& args, cudaStream_t stream);
void usable_scales(const UsableScalesArgs& args, cudaStream_t stream);
}  // namespace cuda

}  // namespace sparse24
