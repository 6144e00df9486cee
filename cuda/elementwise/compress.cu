// The host side of compress and compress_fp8, which picks the kernel and its grid.
#include "common/activation.cuh"
#include "common/dispatch.cuh"
#include "elementwise/amax.cuh"
#include "elementwise/compress_features.cuh"
#include "elementwise/compress_tokens.cuh"
#include "sparse24/compress.h"

namespace sparse24::cuda {
namespace {

// One call, with A its ElementwiseActivation.
template <class A>
struct Compress {
  using T = typename A::T;
  const CompressArgs& args;
  const Operand a;
  const T* x;
  uint8_t* values8;
  const A activation;
  cudaStream_t stream;

  Compress(const CompressArgs& args, const A& activation, cudaStream_t stream)
      : args(args),
        a(Operand::of(args.rows, args.cols, args.values_dtype, args.dim)),
        x(static_cast<const T*>(args.x)),
        values8(static_cast<uint8_t*>(args.values)),
        activation(activation),
        stream(stream) {}

  void features_16bit() const {
    const int64_t column_blocks = ceil_div(a.k_meta, kColumns16);
    compress_features_16bit<A><<<column_blocks*(a.m_meta / kRows16), kThreads16, 0, stream>>>(
        x, args.rows, args.cols, a, static_cast<T*>(args.values), args.meta, int(column_blocks), activation);
    check_launch("compress_features_16bit");
  }

  void tokens_16bit() const {
    const int64_t feature_blocks = ceil_div(a.m_meta, kFeatures16);
    compress_tokens_16bit<A><<<feature_blocks*(a.k_meta / kTokens16), kTokenThreads, 0, stream>>>(
        x, args.rows, args.cols, a, static_cast<T*>(args.values), args.meta, int(feature_blocks), activation);
    check_launch("compress_tokens_16bit");
  }

  template <int kSegments, bool kComputeScale>
  void features_fp8(int threads, int64_t column_blocks, const float* scale, int scale_stride) const {
    compress_features_fp8<A, kSegments, kComputeScale><<<column_blocks * a.m_meta, threads, 0, stream>>>(
        x, args.rows, args.cols, a, values8, args.meta, scale, scale_stride, args.computed_scale, int(column_blocks),
        activation);
    check_launch("compress_features_fp8");
  }

  // Keeps whole rows in registers, so that X is read once for the scale and the values. Returns false where they do not
  // fit.
  bool features_fp8_one_pass() const {
    const int64_t segments = a.k_meta / 16;
    if (segments > 4 * kMaxThreads8) return false;
    const int per_thread = segments < 256 ? 2 : 4;  // work per thread pays for its share of the reduction
    const int threads = int(round_up(ceil_div(segments, per_thread), 32));
    per_thread == 2 ? features_fp8<2, true>(threads, 1, nullptr, 0) : features_fp8<4, true>(threads, 1, nullptr, 0);
    return true;
  }

  void fp8() const {
    const bool features = args.dim == Dim::kFeatures, per_row = args.scaling == Scaling::kRow;
    const float* scale = args.given_scale;
    if (!scale) {
      if (features && per_row && a.m > 0 && a.k > 0 && features_fp8_one_pass()) return;
      const ScaleOf of = !per_row ? ScaleOf::kTensor : features ? ScaleOf::kRow : ScaleOf::kColumn;
      compute_scale(activation, x, args.rows, args.cols, of, args.computed_scale, stream);
      scale = args.computed_scale;
    }
    if (a.m == 0 || a.k == 0) return;
    if (features) {
      constexpr int kThreads = 256;
      features_fp8<2, false>(kThreads, ceil_div(a.k_meta, kThreads * 2 * 16), scale, per_row);
    } else {
      const int64_t feature_blocks = ceil_div(a.m_meta, kFeatures8);
      compress_tokens_fp8<A><<<feature_blocks*(a.k_meta / kTokens8), kTokenThreads, 0, stream>>>(
          x, args.rows, args.cols, a, values8, args.meta, scale, per_row, int(feature_blocks), activation);
      check_launch("compress_tokens_fp8");
    }
  }

  void run() const {
    if (args.values_dtype == DType::kFloat8E4M3) return fp8();
    if (a.m == 0 || a.k == 0) return;
    args.dim == Dim::kFeatures ? features_16bit() : tokens_16bit();
  }
};

}  // namespace

void compress(const CompressArgs& args, cudaStream_t stream) {
  dispatch_16bit(args.x_dtype, [&](auto t) {
    dispatch_activation<decltype(t)>(args.activation, [&](const auto& activation) {
      Compress<std::decay_t<decltype(activation)>>(args, activation, stream).run();
    });
  });
}

}  // namespace sparse24::cuda
