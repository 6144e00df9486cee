/// @file
/// linear_relu2 and linear_compress: the first GEMM of the feed-forward network, with the activation in its epilogue.
///
///     h = (x @ w.T) * scale_x * scale_w + bias     in fp32, rounded to the 16-bit type `hidden_dtype`
///     y = relu(h)^2                                in fp32; or relu(h), its root
///
/// linear_relu2 stores y, linear_compress its 2:4 form. Given the same h both are bit-identical to the separate steps:
/// a cast, or compress / compress_fp8. Squares order as their roots do, so that both keep the same pattern.
#pragma once

#include <vector>

#include "sparse24/activation.h"
#include "sparse24/device_model.h"
#include "sparse24/format.h"
#include "sparse24/gemm.h"

namespace sparse24 {

/// What both have in common: x [tokens, in] and w [out, in], row-major and contiguous.
struct LinearArgs {
  int64_t tokens, in, out;
  const void* x;
  const void* w;
  DType dtype;         ///< of x and w
  DType hidden_dtype;  ///< what h is rounded to: dtype, or a 16-bit type for fp8; float32 on the CPU only

  const float* scale_x = nullptr;  ///< null: 1
  bool scale_x_per_row = false;    ///< [tokens], else one element
  const float* scale_w = nullptr;  ///< null: 1
  bool scale_w_per_row = false;    ///< [out], else one element
  const void* bias = nullptr;      ///< [out] of hidden_dtype, null: 0

  DType y_dtype;                   ///< hidden_dtype, or kFloat8E4M3
  const float* scale_y = nullptr;  ///< fp8: the dequantising scale of y; counts as `usable_scale` (quantize.h)
  bool scale_y_per_row = false;    ///< [tokens], else one element

  float* amax = nullptr;         ///< one element, zero before the call: max y, NaN not counted; null: not wanted
  int32_t* saturated = nullptr;  ///< one element, zero before the call: kept values with |y / scale_y| > 448

  /// kRelu2 or kRelu. Training in float16 keeps roots: its squares underflow where the derivative does not.
  ActivationArgs activation = Activation::kRelu2;
};

/// y [tokens, out], cast to y_dtype (fp8: e4m3(y * (1 / scale_y)), saturating).
struct LinearRelu2Args {
  LinearArgs linear;
  void* y;
};

/// values and meta as `Operand::of(tokens, out, meta_dtype, Dim::kFeatures)` lays them out, values of y_dtype.
struct LinearCompressArgs {
  LinearArgs linear;
  void* values;
  uint8_t* meta;
  DType meta_dtype;  ///< y_dtype; or kFloat8E4M3 beside 16-bit values that are quantised afterwards
};

/// Older names.
using LinearTile = GemmTile;
using LinearConfig = GemmConfig;

/// The tiles that an op is compiled for, narrow ones first.
using LinearTiles = std::vector<GemmTile>;
/// x: of x and w.
LinearTiles linear_relu2_tiles(DType x, DType y);
LinearTiles linear_compress_tiles(DType x, DType y, DType meta);
LinearTiles linear_relu2_gradient_tiles();

/// The configurations of these tiles for `dtype`, narrow ones first: what `select_linear_config` chooses from, before
/// it orders the tiles.
std::vector<GemmConfig> linear_configs(DType dtype, const LinearTiles& tiles);

/// The configuration for x [m, k] and w [n, k] of `dtype`, a pure function; with a number of multiprocessors: of the
/// reference device.
GemmConfig select_linear_config(DType dtype, int64_t m, int64_t n, int64_t k, const DeviceModel& device,
                                const LinearTiles& tiles);
GemmConfig select_linear_config(DType dtype, int64_t m, int64_t n, int64_t k, int sm_count, const LinearTiles& tiles);

namespace cpu {
void linear_relu2(const LinearRelu2Args& args);
void linear_compress(const LinearCompressArgs& args);
}  // namespace cpu

namespace cuda {
/// Choose a configuration for the current device.
void linear_relu2(const LinearRelu2Args& args, cudaStream_t stream);
void linear_compress(const LinearCompressArgs& args, cudaStream_t stream);
/// With a configuration of the caller's: for tuning and for tests of every kernel.
void linear_relu2(const LinearRelu2Args& args, const GemmConfig& config, cudaStream_t stream);
void linear_compress(const LinearCompressArgs& args, const GemmConfig& config, cudaStream_t stream);
}  // namespace cuda

}  // namespace sparse24
