// The kernels of relu2_mlp_dense: two products of a few dozen tokens, each of which streams its weight once.
#pragma once

#include "common/float8.cuh"
#include "common/packed.cuh"
#include "few_tokens/dense_exchange.cuh"
#include "sparse24/quantize.h"

namespace sparse24::cuda {

template <class T>
__device__ __forceinline__ uint16_t to_bits(T, float v) {
  return uint16_t(pack2(T{}, v, 0.f));
}

// What belongs to the two rows of a thread.
struct RowFactors {
  float scale[2] = {1.f, 1.f}, bias[2] = {0.f, 0.f};

  template <class T>  // of a bias of 16 bits
  __device__ __forceinline__ void load(T, const DenseFactors& f, int row, int end) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row + 8 * h;
      if (r >= end) continue;
      if (f.scale_w != nullptr) scale[h] = f.scale_w[f.scale_w_per_row ? r : 0];
      if (f.bias == nullptr) continue;
      bias[h] = f.bias_is_float ? static_cast<const float*>(f.bias)[r]
                                : to_float(T{}, static_cast<const uint16_t*>(f.bias)[r]);
    }
  }
};

// y = max(h, 0)^2, of h that is rounded to T; codes of float8 where the operands are and y has a scale.
template <class Tile, class T>
struct DenseRelu2 {
  using Params = DenseRelu2Params;
  static constexpr bool kFp8 = sizeof(typename Tile::Element) == 1;

  const Params& p;
  typename Tile::Shared& shared;  // of tokens: scales of x, and the inverse of those of y
  RowFactors rows;

  // What no product is needed for.
  __device__ __forceinline__ void prepare(int tokens, int threads) const {
    for (int i = blockIdx.x * threads + threadIdx.x; i < p.count; i += gridDim.x * threads) p.counters[i] = 0;
    if constexpr (kFp8) {
      for (int t = threadIdx.x; t < tokens; t += threads) {
        shared.of_tokens[0][t] = p.scale_x[p.scale_x_per_token ? t : 0];
        if (p.factors.scale_y == nullptr) continue;
        shared.of_tokens[1][t] = __frcp_rn(usable_scale(p.factors.scale_y[p.factors.scale_y_per_token ? t : 0]));
      }
    }
  }
  __device__ __forceinline__ void begin(int row, int end) { rows.load(T{}, p.factors, row, end); }

  __device__ __forceinline__ void finish(const DenseWalk& walk, int unit, int tokens, int threads,
                                         unsigned char* exchange, float (&c)[Tile::kTokens / 2]) const {
    const int first = walk.first_row(walk.tile(unit)), end = walk.first_row(walk.tile(unit) + 1);
    const auto squared = [&](int i, int token) {
      const int h = i / 2 % 2;
      float sum = c[i];
      if constexpr (kFp8) sum = __fmul_rn(__fmul_rn(sum, shared.of_tokens[0][token]), rows.scale[h]);
      if (p.factors.bias != nullptr) sum = __fadd_rn(sum, rows.bias[h]);
      const float root = to_float(T{}, to_bits(T{}, sum));
      const float kept = root <= p.threshold ? 0.f : root;  // NaN is kept
      return __fmul_rn(kept, kept);
    };
    if (kFp8 && p.factors.scale_y != nullptr) {
      store_exchanged<Tile>(static_cast<uint8_t*>(p.y), walk.rows, first, end, tokens, threads, exchange,
                            [&](int i, int token) {
                              return uint8_t(to_e4m3x2(__fmul_rn(squared(i, token), shared.of_tokens[1][token]), 0.f));
                            });
    } else {
      store_exchanged<Tile>(static_cast<uint16_t*>(p.y), walk.rows, first, end, tokens, threads, exchange,
                            [&](int i, int token) { return to_bits(T{}, squared(i, token)); });
    }
  }
};

// The sums of the slices of K, which the block that is done last adds in order.
template <class Tile>
struct DenseSum {
  using Params = DenseSumParams;
  static constexpr bool kFp8 = sizeof(typename Tile::Element) == 1;

  const Params& p;
  typename Tile::Shared& shared;  // of tokens: scales of y
  RowFactors rows;

  __device__ __forceinline__ void prepare(int tokens, int threads) const {
    if constexpr (kFp8) {
      for (int t = threadIdx.x; t < tokens; t += threads) {
        shared.of_tokens[0][t] = usable_scale(p.factors.scale_y[p.factors.scale_y_per_token ? t : 0]);
      }
    }
  }
  __device__ __forceinline__ void begin(int row, int end) {
    if (p.out_is_half) {
      rows.load(__half{}, p.factors, row, end);
    } else {
      rows.load(__nv_bfloat16{}, p.factors, row, end);
    }
  }

  // Returns whether this block has the sums of all slices.
  __device__ __forceinline__ bool add_slices(const DenseWalk& walk, int unit, int threads,
                                             float (&c)[Tile::kTokens / 2]) const {
    constexpr int kFours = Tile::kTokens / 8;
    auto* sums = reinterpret_cast<float4*>(p.sums) + threadIdx.x;
    const int of_unit = kFours * threads;
#pragma unroll
    for (int j = 0; j < kFours; ++j) {
      sums[int64_t{unit} * of_unit + j * threads] = make_float4(c[4 * j], c[4 * j + 1], c[4 * j + 2], c[4 * j + 3]);
    }
    __threadfence();
    wait_for_warpgroups(threads);
    if (threadIdx.x == 0) shared.last = atomicAdd(p.counters + walk.tile(unit), 1u) == unsigned(walk.slices - 1);
    wait_for_warpgroups(threads);
    if (!shared.last) return false;
    __threadfence();
#pragma unroll
    for (float& v : c) v = 0.f;
    const int tile = walk.tile(unit);
    constexpr int kLoads = kFours < 8 ? kFours : 8;  // under way at a time, of a slice
#pragma unroll
    for (int first = 0; first < kFours; first += kLoads) {
#pragma unroll(kFours > kLoads ? 1 : 16 / kLoads)
      for (int s = 0; s < walk.slices; ++s) {
        const float4* of_slice = sums + int64_t{s * walk.tiles + tile} * of_unit;
#pragma unroll
        for (int j = first; j < first + kLoads; ++j) {
          const float4 v = __ldcg(of_slice + j * threads);
          c[4 * j] += v.x, c[4 * j + 1] += v.y, c[4 * j + 2] += v.z, c[4 * j + 3] += v.w;
        }
      }
    }
    return true;
  }

  __device__ __forceinline__ void finish(const DenseWalk& walk, int unit, int tokens, int threads,
                                         unsigned char* exchange, float (&c)[Tile::kTokens / 2]) const {
    if (walk.slices > 1 && !add_slices(walk, unit, threads, c)) return;
    const int first = walk.first_row(walk.tile(unit)), end = walk.first_row(walk.tile(unit) + 1);
    store_exchanged<Tile>(static_cast<uint16_t*>(p.out), walk.rows, first, end, tokens, threads, exchange,
                          [&](int i, int token) {
                            const int h = i / 2 % 2;
                            float sum = c[i];
                            if constexpr (kFp8) {
                              sum = __fmul_rn(__fmul_rn(sum, shared.of_tokens[0][token]), rows.scale[h]);
                            }
                            if (p.factors.bias != nullptr) sum = __fadd_rn(sum, rows.bias[h]);
                            return p.out_is_half ? to_bits(__half{}, sum) : to_bits(__nv_bfloat16{}, sum);
                          });
  }
};

template <class Tile, class Sink>
__global__ void __launch_bounds__(Tile::kMaxThreads, 1)
    dense_few_kernel(const __grid_constant__ DenseLaunch<typename Sink::Params> launch) {
  extern __shared__ __align__(1024) unsigned char bytes[];
  auto& shared = *reinterpret_cast<typename Tile::Shared*>(bytes);
  const DenseWalk& walk = launch.walk;
  const int warpgroups = walk.warpgroups(), warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0);
  const int threads = warpgroups * 128;
  const DenseRing<Tile> ring{(shared_address(&shared + 1) + 1023) / 1024 * 1024,
                             launch.stages,
                             Tile::w_box(walk.box_rows),
                             Tile::stage(walk.box_rows),
                             shared.full,
                             shared.empty};
  if (!launch.dependent) wait_for_predecessors();
  if (threadIdx.x == 0) ring.initialise(warpgroups * 4);
  __syncthreads();
  launch_dependents();
  if (warp == warpgroups * 4) {
    if (threadIdx.x % 32 == 0) DenseCopies<Tile, DenseLaunch<typename Sink::Params>>(launch, ring).run();
    return;
  }
  Sink sink{launch.params, shared, {}};
  wait_for_predecessors();
  sink.prepare(launch.tokens, threads);
  wait_for_warpgroups(threads);
  unsigned char* exchange = bytes + (ring.stages_at - shared_address(bytes)) + launch.stages * ring.stage_bytes;
  int stage = 0, phase = 0;
  for (int unit = blockIdx.x; unit < walk.units(); unit += gridDim.x) {
    const int tile = walk.tile(unit), slice = walk.slice(unit);
    sink.begin(walk.first_row(tile) + DensePlace().row, walk.first_row(tile + 1));
    float c[Tile::kTokens / 2] = {};
    multiply_unit<Tile>(ring, warp / 4, walk.first_chunk(slice + 1) - walk.first_chunk(slice), stage, phase, c);
    sink.finish(walk, unit, launch.tokens, threads, exchange, c);
  }
}

}  // namespace sparse24::cuda
