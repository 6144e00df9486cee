// The end of mm_active: the sums of a block, and then those of all slices of the neurons, are added in order.
#pragma once

#include <type_traits>

#include "common/packed.cuh"
#include "few_tokens/active_rows.cuh"

namespace sparse24::cuda {

// Up to eight tokens. The blocks write their sums, and a kernel behind them adds those up: it is faster than a block
// that comes last, and no block waits for others, which need not be there yet.
struct ActiveLaunch {
  MmActiveArgs args;
  float* sums;  // [slices][tokens][pitch]
  int pitch;    // a multiple of eight
};

template <class T>
__device__ __forceinline__ void store_as(void* out, int64_t i, float v) {
  if constexpr (std::is_same_v<T, float>) {
    static_cast<float*>(out)[i] = v;
  } else {
    static_cast<uint16_t*>(out)[i] = uint16_t(pack2(T{}, v, 0.f));
  }
}
__device__ __forceinline__ void store_as(DType dtype, void* out, int64_t i, float v) {
  if (dtype == DType::kFloat32) return store_as<float>(out, i, v);
  if (dtype == DType::kBFloat16) return store_as<__nv_bfloat16>(out, i, v);
  store_as<__half>(out, i, v);
}
__device__ __forceinline__ float load_as(DType dtype, const void* data, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return dtype == DType::kBFloat16 ? to_float(__nv_bfloat16{}, bits) : to_float(__half{}, bits);
}
__device__ __forceinline__ float4 add4(const float4& a, const float4& b) {
  return {__fadd_rn(a.x, b.x), __fadd_rn(a.y, b.y), __fadd_rn(a.z, b.z), __fadd_rn(a.w, b.w)};
}

// The sums of the even and the odd neurons of a slice: each half of the warps adds those of half of the tokens.
// `shared`: Tile::kSumBytes, which no thread uses any more when all have come here.
template <class Tile>
__device__ __forceinline__ void store_active_sums(const ActiveLaunch& launch, unsigned char* shared, int slice,
                                                  ActiveColumns columns, const float (&c)[Tile::kTokens][8]) {
  constexpr int kHalf = Tile::kTokens / 2, kThreads = Tile::kThreads / 2;  // of the tokens, of the threads
  const int parity = threadIdx.x / kThreads, thread = threadIdx.x % kThreads;
  const int column = thread / 32 * Tile::kWarpColumns + thread % 32 * 4;  // and those 128 behind
  const int tokens = int(launch.args.tokens);
  const auto at = [&](int token, int half) {
    return reinterpret_cast<float4*>(shared) + (token * 2 + half) * kThreads + thread;
  };
  __syncthreads();
#pragma unroll
  for (int t = 0; t < Tile::kTokens; ++t) {
    if (t / kHalf == parity) continue;
    *at(t, 0) = {c[t][0], c[t][1], c[t][2], c[t][3]};
    *at(t, 1) = {c[t][4], c[t][5], c[t][6], c[t][7]};
  }
  __syncthreads();
#pragma unroll
  for (int t = 0; t < Tile::kTokens; ++t) {
    if (t / kHalf != parity || t >= tokens) continue;
    auto* to =
        reinterpret_cast<float4*>(launch.sums + (int64_t{slice} * tokens + t) * launch.pitch + columns.first + column);
    if (column < columns.count) __stcg(to, add4({c[t][0], c[t][1], c[t][2], c[t][3]}, *at(t, 0)));
    if (column + 128 < columns.count) __stcg(to + 32, add4({c[t][4], c[t][5], c[t][6], c[t][7]}, *at(t, 1)));
  }
}

// Each warp adds some of the slices of 128 columns of a token; then the warps are added.
struct ActiveSumTile {
  static constexpr int kSlices = int(kActivePart), kWarps = int(kActiveSlices) / kSlices, kThreads = 32 * kWarps;
  static constexpr int kColumns = 128;
  static_assert(kSlices * kWarps == kActiveSlices);
};

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads) add_active_sums_kernel(const ActiveLaunch launch) {
  __shared__ float4 of_warp[Tile::kWarps][32];
  const MmActiveArgs& args = launch.args;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int strips = (launch.pitch + Tile::kColumns - 1) / Tile::kColumns, token = blockIdx.x / strips;
  const int column = blockIdx.x % strips * Tile::kColumns + lane * 4, out_features = int(args.out_features);
  const auto* sums = launch.sums + int64_t{token} * launch.pitch + column;
  const int64_t slice_pitch = args.tokens * int64_t{launch.pitch};

  const int mine = blockIdx.x % strips * Tile::kColumns + threadIdx.x;  // the column that this thread ends
  wait_for_predecessors();
  float scale = 1.f, bias = 0.f;
  if (threadIdx.x < Tile::kColumns && mine < out_features) {
    if (args.scale_w != nullptr) scale = args.scale_w[args.scale_w_per_column ? mine : 0];
    if (args.bias != nullptr) bias = load_as(args.bias_dtype, args.bias, mine);
  }
  float4 total{0.f, 0.f, 0.f, 0.f};
  if (column < launch.pitch) {
    float4 v[Tile::kSlices];
#pragma unroll
    for (int s = 0; s < Tile::kSlices; ++s) {
      v[s] = __ldcg(reinterpret_cast<const float4*>(sums + (warp * Tile::kSlices + s) * slice_pitch));
    }
#pragma unroll
    for (int s = 0; s < Tile::kSlices; ++s) total = add4(total, v[s]);
  }
  of_warp[warp][lane] = total;
  __syncthreads();
  if (threadIdx.x >= Tile::kColumns) return;
  if (mine >= out_features) return;
  float sum = 0.f;
#pragma unroll
  for (int s = 0; s < Tile::kWarps; ++s) {
    sum = __fadd_rn(sum, reinterpret_cast<const float*>(of_warp[s])[threadIdx.x]);
  }
  if (args.scale_w != nullptr) sum = __fmul_rn(sum, scale);
  if (args.bias != nullptr) sum = __fadd_rn(sum, bias);
  store_as(args.out_dtype, args.out, int64_t{token} * out_features + mine, sum);
}

}  // namespace sparse24::cuda
