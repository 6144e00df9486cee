// quantize_fp8: dense X becomes e4m3, with row scales from the same read, a scale of the tensor, or a given one.
#include "common/activation.cuh"
#include "common/dependent_launches.cuh"
#include "common/dispatch.cuh"
#include "common/float8.cuh"
#include "common/packed.cuh"
#include "common/warp.cuh"
#include "elementwise/amax.cuh"
#include "sparse24/quantize.h"

namespace sparse24::cuda {
namespace {

constexpr int kMaxThreads = 512, kFewThreads = 64;  // of a row

template <class T>
using Raw = ElementwiseActivation<T, Activation::kNone>;

__device__ __forceinline__ uint32_t four_to_e4m3(const float (&y)[16], int i, float inverse) {
  const uint16_t lo = to_e4m3x2(__fmul_rn(y[i], inverse), __fmul_rn(y[i + 1], inverse));
  const uint16_t hi = to_e4m3x2(__fmul_rn(y[i + 2], inverse), __fmul_rn(y[i + 3], inverse));
  return pack16(lo, hi);
}

// The sum of the squares of up to 16 codes, exactly, in two floats: a multiple of one, and what is left of each square,
// which is a multiple of 2^-18. As integers squares take twice the instructions.
class SquaresOf16 {
 public:
  // Adds those of four codes, of which NaN counts as 480.
  __device__ __forceinline__ void add(uint32_t codes) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const __half2_raw pair = __nv_cvt_fp8x2_to_halfraw2(__nv_fp8x2_storage_t(codes >> 16 * i), __NV_E4M3);
      const float2 v = __half22float2(__hmin2(__habs2(__half2(pair)), __float2half2_rn(480.f)));
      add(v.x);
      add(v.y);
    }
  }
  // In units.
  __device__ __forceinline__ int64_t sum() const {
    return (int64_t{__float_as_int(whole_) - __float_as_int(kZero)} << 18) + int(__fmul_rn(rest_, 0x1p18f));
  }

 private:
  static constexpr float kZero = 0x1.8p23f;  // from here on floats are 1 apart, to 4 million more

  __device__ __forceinline__ void add(float v) {
    const float next = __fmaf_rn(v, v, whole_);
    rest_ = __fadd_rn(rest_, __fmaf_rn(v, v, __fsub_rn(whole_, next)));
    whole_ = next;
  }

  float whole_ = kZero, rest_ = 0;
};

// Writes the prediction of a row, of whose codes each thread of the block has seen some. All threads call it.
__device__ __forceinline__ void write_prediction(int64_t squares, float scale, float factor, float* predicted) {
  __shared__ unsigned long long sum;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, lanes);
  if (threadIdx.x % 32 == 0) atomicAdd(&sum, static_cast<unsigned long long>(squares));
  __syncthreads();
  if (threadIdx.x == 0) *predicted = predicted_scale(int64_t(sum), scale, factor);
}

// Quantises a row by a CTA, or a block of its columns where the scale is given; a thread owns kSegments times 16
// elements.
template <class T, int kSegments, bool kComputeScale, bool kPredict>
__global__ void __launch_bounds__(kMaxThreads)
    quantize_rows(const T* x, int64_t cols, uint8_t* q, const float* given_scale, int scale_stride,
                  float* computed_scale, int column_blocks, const float* factor, float* predicted) {
  launch_dependents();  // one that waits for the codes itself may fetch weights meanwhile
  const int64_t row = blockIdx.x / column_blocks;
  const int64_t col0 = int64_t(blockIdx.x % column_blocks) * kSegments * blockDim.x * 16;
  const auto column = [&](int s) { return col0 + (int64_t(s) * blockDim.x + threadIdx.x) * 16; };

  Vec8 v[kSegments][2] = {};
#pragma unroll
  for (int s = 0; s < kSegments; ++s) {
    if (column(s) < cols) {
      v[s][0] = load16(x + row * cols + column(s));
      v[s][1] = load16(x + row * cols + column(s) + 8);
    }
  }
  float scale;
  if constexpr (kComputeScale) {
    __shared__ float partial[kMaxThreads / 32];
    const int lane = threadIdx.x % 32;
    typename Pair<T>::type m{};
#pragma unroll
    for (int s = 0; s < kSegments; ++s) m = Raw<T>::max(Raw<T>::max(m, v[s][0]), v[s][1]);
    const float warp = warp_max(Raw<T>::activated_max(m));
    if (lane == 0) partial[threadIdx.x / 32] = warp;
    __syncthreads();
    scale = scale_of(warp_max(lane < blockDim.x / 32 ? partial[lane] : 0.f));
    if (threadIdx.x == 0) computed_scale[row] = scale;
  } else {
    scale = usable_scale(given_scale[row * scale_stride]);
  }
  const float inverse = __frcp_rn(scale);
  int64_t squares = 0;
#pragma unroll
  for (int s = 0; s < kSegments; ++s) {
    if (column(s) >= cols) continue;
    float y[16];
    uint32_t codes[4];
    SquaresOf16 of_segment;
#pragma unroll
    for (int i = 0; i < 16; ++i) y[i] = to_float(T{}, v[s][i / 8][i % 8]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      codes[i] = four_to_e4m3(y, 4 * i, inverse);
      if constexpr (kPredict) of_segment.add(codes[i]);
    }
    if constexpr (kPredict) squares += of_segment.sum();
    store16(q + row * cols + column(s), codes[0], codes[1], codes[2], codes[3]);
  }
  if constexpr (kPredict) write_prediction(squares, scale, *factor, predicted + row);
}

// Writes the predictions of rows that are too wide for the kernel above, from their codes. A CTA has a row.
__global__ void __launch_bounds__(kMaxThreads)
    predict_rows(const uint8_t* q, int64_t cols, const float* scale, const float* factor, float* predicted) {
  const int64_t row = blockIdx.x;
  int64_t squares = 0;
  for (int64_t col = threadIdx.x * 16; col < cols; col += kMaxThreads * 16) {
    const Vec8 codes = load16(q + row * cols + col);
    SquaresOf16 of_segment;
#pragma unroll
    for (uint32_t w : codes.w) of_segment.add(w);
    squares += of_segment.sum();
  }
  write_prediction(squares, scale[row], *factor, predicted + row);
}

// It stands between two large kernels: launched while the one before runs, it lets the one behind begin its own set-up.
__global__ void __launch_bounds__(kMaxThreads) usable_scales_kernel(const UsableScalesArgs args) {
  launch_dependents();
  wait_for_predecessors();
  const int64_t i = int64_t{blockIdx.x} * kMaxThreads + threadIdx.x;
  if (i < args.count) args.used[i] = usable_scale(args.given[i]);
}

template <class T>
void run(const QuantizeArgs& args, cudaStream_t stream) {
  const T* x = static_cast<const T*>(args.x);
  using std::false_type, std::true_type;
  const auto launch = [&](auto segments, auto compute_scale, auto predict, int threads, int64_t column_blocks,
                          const float* scale) {
    if (args.rows == 0 || args.cols == 0) return;
    quantize_rows<T, decltype(segments)::value, decltype(compute_scale)::value, decltype(predict)::value>
        <<<column_blocks * args.rows, threads, 0, stream>>>(x, args.cols, static_cast<uint8_t*>(args.q), scale,
                                                            args.scaling == Scaling::kRow, args.computed_scale,
                                                            int(column_blocks), args.factor, args.predicted);
    check_launch("quantize_rows");
  };
  const int64_t segments = ceil_div(args.cols, 16);
  const bool computes_rows = !args.given_scale && args.scaling == Scaling::kRow;
  if (computes_rows && 0 < segments && segments <= 4 * kMaxThreads) {  // in registers
    // As many of a thread as leave two warps: what a thread does once a row counts.
    const int64_t per_thread = segments < 2 * kFewThreads ? 1 : segments < 4 * kFewThreads ? 2 : 4;
    const int threads = int(round_up(ceil_div(segments, per_thread), 32));
    const auto launch_rows = [&](auto predict) {
      switch (per_thread) {
        case 1: return launch(std::integral_constant<int, 1>{}, true_type{}, predict, threads, 1, nullptr);
        case 2: return launch(std::integral_constant<int, 2>{}, true_type{}, predict, threads, 1, nullptr);
        default: return launch(std::integral_constant<int, 4>{}, true_type{}, predict, threads, 1, nullptr);
      }
    };
    return args.predicted ? launch_rows(true_type{}) : launch_rows(false_type{});
  }
  check(!args.predicted || computes_rows,
        "sparse24.quantize_fp8: expected computed row scales to predict from, got others");
  const float* scale = args.given_scale;
  if (!scale) {
    compute_scale(Raw<T>(Activation::kNone), x, args.rows, args.cols, computes_rows ? ScaleOf::kRow : ScaleOf::kTensor,
                  args.computed_scale, stream);
    scale = args.computed_scale;
  }
  constexpr int kThreads = 256;
  launch(std::integral_constant<int, 1>{}, false_type{}, false_type{}, kThreads, ceil_div(segments, kThreads), scale);
  if (args.predicted && args.rows > 0) {
    predict_rows<<<unsigned(args.rows), kMaxThreads, 0, stream>>>(static_cast<const uint8_t*>(args.q), args.cols, scale,
                                                                  args.factor, args.predicted);
    check_launch("predict_rows");
  }
}

}  // namespace

void usable_scales(const UsableScalesArgs& args, cudaStream_t stream) {
  if (args.count == 0) return;
  cudaLaunchAttribute early;
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(ceil_div(args.count, kMaxThreads)));
  config.blockDim = dim3(kMaxThreads);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, usable_scales_kernel, args), "usable_scales");
}

void quantize_fp8(const QuantizeArgs& args, cudaStream_t stream) {
  dispatch_16bit(args.x_dtype, [&](auto t) { run<decltype(t)>(args, stream); });
}

}  // namespace sparse24::cuda
