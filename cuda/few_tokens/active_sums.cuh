// The end of mm_active: the sums of the warps of a block, and then of the blocks of a strip, are added in order.
#pragma once

#include <type_traits>

#include "common/packed.cuh"
#include "sparse24/mm_active.h"

namespace sparse24::cuda {

// The blocks of a strip each write their sums, and the last one that has done so adds them up. They are no cluster:
// clusters of more than two blocks do not fill the multiprocessors.
struct ActiveLaunch {
  MmActiveArgs args;
  int blocks;     // of a strip, for any number of tokens
  float* sums;    // [blocks][tokens][pitch]
  int pitch;      // whole strips
  int* arrivals;  // [strips][groups of tokens], zeros at the start
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

// `shared`: [warps] of Tile::kWarpBytes, which begin with the sums [tokens][kPitch]. `index` is that of the strip and
// the group of tokens.
template <class Tile>
__device__ __forceinline__ void add_active_sums(const ActiveLaunch& launch, const unsigned char* shared, unsigned index,
                                                unsigned rank, int token0, int tokens, int strip0) {
  const MmActiveArgs& args = launch.args;
  constexpr int kQuads = Tile::kColumns / 4;
  const auto add = [](float4& to, const float4& from) {
    to = {__fadd_rn(to.x, from.x), __fadd_rn(to.y, from.y), __fadd_rn(to.z, from.z), __fadd_rn(to.w, from.w)};
  };
  const auto of_warp = [&](int warp, int i) {
    const int at = (i / kQuads * Tile::kPitch + i % kQuads * 4) * 4;
    return reinterpret_cast<const float4*>(shared + warp * Tile::kWarpBytes + at);
  };
  const auto of_block = [&](int block, int i) {
    const int64_t row = int64_t{block} * args.tokens + token0 + i / kQuads;
    return reinterpret_cast<float4*>(launch.sums + row * launch.pitch + strip0 + i % kQuads * 4);
  };
  for (int i = threadIdx.x; i < tokens * kQuads; i += Tile::kThreads) {
    float4 total{0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int warp = 0; warp < Tile::kWarps; ++warp) add(total, *of_warp(warp, i));
    __stcg(of_block(int(rank), i), total);
  }
  __syncthreads();
  bool arrives_last = false;
  if (threadIdx.x == 0) {
    __threadfence();  // what all threads have written is seen before the count
    arrives_last = atomicAdd(launch.arrivals + index, 1) == launch.blocks - 1;
    __threadfence();
  }
  if (!__syncthreads_or(arrives_last)) return;

  const int out_features = int(args.out_features);
  for (int i = threadIdx.x; i < tokens * kQuads; i += Tile::kThreads) {
    const int64_t token = token0 + i / kQuads;
    const int from = strip0 + i % kQuads * 4;
    if (from >= out_features) continue;
    float4 total{0.f, 0.f, 0.f, 0.f};
#pragma unroll 16
    for (int block = 0; block < launch.blocks; ++block) add(total, __ldcg(of_block(block, i)));
    const float of_column[4] = {total.x, total.y, total.z, total.w};
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      if (from + v >= out_features) break;
      float sum = of_column[v];
      if (args.scale_w != nullptr) sum = __fmul_rn(sum, args.scale_w[args.scale_w_per_column ? from + v : 0]);
      if (args.bias != nullptr) sum = __fadd_rn(sum, load_as(args.bias_dtype, args.bias, from + v));
      store_as(args.out_dtype, args.out, token * out_features + from + v, sum);
    }
  }
}

}  // namespace sparse24::cuda
