// Adds up the parts of a product whose K was split: D = scale_a * scale_b * (sum of parts, in order) + bias.
#include "common/dispatch.cuh"
#include "common/launch.cuh"
#include "common/packed.cuh"
#include "gemm/mm_splits.h"

namespace sparse24::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kColumns = 4;  // of one thread: 16 bytes of sums

struct SplitsParams {
  const float* sums;
  int splits, m, n;
  int64_t ld;
  void* d;
  const float* scale_a;
  const float* scale_b;
  const void* bias;
  bool bias_fp32;
  int scale_a_stride, scale_b_stride;  // 0: one element
};

__device__ __forceinline__ void store(float* d, const float (&v)[kColumns]) {
  *reinterpret_cast<float4*>(d) = make_float4(v[0], v[1], v[2], v[3]);
}
template <class T>
__device__ __forceinline__ void store(T* d, const float (&v)[kColumns]) {
  *reinterpret_cast<uint2*>(d) = make_uint2(pack2(T{}, v[0], v[1]), pack2(T{}, v[2], v[3]));
}
__device__ __forceinline__ void store(float& d, float v) { d = v; }
__device__ __forceinline__ void store(__nv_bfloat16& d, float v) { d = __float2bfloat16_rn(v); }
__device__ __forceinline__ void store(__half& d, float v) { d = __float2half_rn(v); }

// A thread makes four columns of one row. T: of D.
template <class T>
__global__ void __launch_bounds__(kThreads) add_partial_sums_kernel(const SplitsParams p) {
  const int m = blockIdx.x, n = (blockIdx.y * kThreads + threadIdx.x) * kColumns;
  if (n >= p.n) return;
  const int count = min(kColumns, p.n - n);
  float scale[kColumns], bias[kColumns];
  const float scale_a = p.scale_a ? p.scale_a[m * p.scale_a_stride] : 1.f;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int column = min(n + c, p.n - 1);
    scale[c] = p.scale_b ? p.scale_b[column * p.scale_b_stride] : 1.f;
    bias[c] = !p.bias       ? 0.f
              : p.bias_fp32 ? static_cast<const float*>(p.bias)[column]
                            : float(static_cast<const T*>(p.bias)[column]);
  }
  // Launched while the product still runs: its sums are there from here on. (What came before it was there already: the
  // product has waited for that.)
  asm volatile("griddepcontrol.wait;" ::: "memory");
  const float* sums = p.sums + m * p.ld + n;
  const int64_t part = int64_t(p.m) * p.ld;
  float v[kColumns] = {};
  if (count == kColumns) {
    float4 parts[kMostSplits];
#pragma unroll
    for (int i = 0; i < kMostSplits; ++i) {
      if (i < p.splits) parts[i] = *reinterpret_cast<const float4*>(sums + i * part);
    }
#pragma unroll
    for (int i = 0; i < kMostSplits; ++i) {
      if (i >= p.splits) break;
      v[0] += parts[i].x;
      v[1] += parts[i].y;
      v[2] += parts[i].z;
      v[3] += parts[i].w;
    }
  } else {
    for (int i = 0; i < p.splits; ++i) {
      for (int c = 0; c < count; ++c) v[c] += sums[i * part + c];
    }
  }
#pragma unroll
  for (int c = 0; c < kColumns; ++c) v[c] = v[c] * scale_a * scale[c] + bias[c];
  T* d = static_cast<T*>(p.d) + int64_t(m) * p.n + n;
  if (p.n % kColumns == 0 && reinterpret_cast<uintptr_t>(p.d) % (kColumns * sizeof(T)) == 0) {
    store(d, v);
  } else {
    for (int c = 0; c < count; ++c) store(d[c], v[c]);
  }
}

template <class T>
void launch(const SplitsParams& params, cudaStream_t stream) {
  cudaLaunchAttribute early;
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(params.m), unsigned(ceil_div(params.n, kThreads * kColumns)));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, add_partial_sums_kernel<T>, params), "sparse24.mm: adding up parts of K");
}

}  // namespace

void add_partial_sums(const MmArgs& args, int splits, cudaStream_t stream) {
  const SplitsParams params{args.workspace,
                            splits,
                            int(args.a.m),
                            int(args.n),
                            partial_sums_ld(args),
                            args.d,
                            args.scale_a,
                            args.scale_b,
                            args.bias,
                            args.bias_dtype == DType::kFloat32,
                            args.scale_a_per_row,
                            args.scale_b_per_column};
  if (args.d_dtype == DType::kFloat32) return launch<float>(params, stream);
  dispatch_16bit(args.d_dtype, [&](auto t) { launch<decltype(t)>(params, stream); });
}

}  // namespace sparse24::cuda
