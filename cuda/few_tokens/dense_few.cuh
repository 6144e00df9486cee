// The kernels of relu2_mlp_dense: two products of a few dozen tokens, each of which streams its weight once.
#pragma once

#include "common/float8.cuh"
#include "common/packed.cuh"
#include "few_tokens/cluster.cuh"
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

// Of tokens: scales of x, and the inverse of those of y.
template <class Tile>
__device__ __forceinline__ void load_token_scales(const DenseRelu2Params& p, typename Tile::Shared& shared, int tokens,
                                                  int threads) {
  for (int t = threadIdx.x; t < tokens; t += threads) {
    shared.of_tokens[0][t] = p.scale_x[p.scale_x_per_token ? t : 0];
    if (p.factors.scale_y == nullptr) continue;
    shared.of_tokens[1][t] = __frcp_rn(usable_scale(p.factors.scale_y[p.factors.scale_y_per_token ? t : 0]));
  }
}

// Of rows of the weight: scales and biases. A thread has one.
template <class Shared>
__device__ __forceinline__ void load_row_factors(const DenseFactors& f, bool is_half, Shared& shared, int first,
                                                 int end) {
  const int row = first + int(threadIdx.x);
  if (row >= end) return;
  RowFactors of_row;
  if (is_half) {
    of_row.load(__half{}, f, row, row + 1);
  } else {
    of_row.load(__nv_bfloat16{}, f, row, row + 1);
  }
  shared.of_rows[0][threadIdx.x] = of_row.scale[0];
  shared.of_rows[1][threadIdx.x] = of_row.bias[0];
}

// The squares of max(h, 0), for two h that are rounded to T.
template <class T>
__device__ __forceinline__ float2 squares_above(T, float threshold, float2 h) {
  const uint32_t root = pack2(T{}, h.x, h.y);
  const float left = to_float(T{}, uint16_t(root)), right = to_float(T{}, uint16_t(root >> 16));
  const float2 kept = make_float2(left <= threshold ? 0.f : left, right <= threshold ? 0.f : right);  // NaN is
  return make_float2(__fmul_rn(kept.x, kept.x), __fmul_rn(kept.y, kept.y));
}

// y = max(h, 0)^2, of h that is rounded to T; codes of float8 where the operands are and y has a scale.
template <class Tile, class T>
struct DenseRelu2 {
  using Params = DenseRelu2Params;
  static constexpr bool kFp8 = sizeof(typename Tile::Element) == 1;
  static constexpr bool kInRing = false;  // while results leave, the ring has what comes next

  const Params& p;
  typename Tile::Shared& shared;  // of tokens: scales of x, and the inverse of those of y
  RowFactors rows{};

  // What no product is needed for.
  __device__ __forceinline__ void prepare(int tokens, int threads) const {
    if constexpr (kFp8) load_token_scales<Tile>(p, shared, tokens, threads);
  }
  __device__ __forceinline__ void begin(int first, int end) {
    rows.load(T{}, p.factors, first + DensePlace().row, end);
  }

  __device__ __forceinline__ void finish(const DenseWalk& walk, int unit, int tokens, int threads,
                                         unsigned char* exchange, float (&c)[Tile::kValues]) const {
    const int first = walk.first_row(walk.tile(unit)), end = walk.first_row(walk.tile(unit) + 1);
    // Of two tokens beside each other.
    const auto squared = [&](int j, int h) {
      float2 v = make_float2(c[4 * j + 2 * h], c[4 * j + 2 * h + 1]);
      if constexpr (kFp8) {
        const float2 scale = of_two(0, j);
        v = make_float2(__fmul_rn(__fmul_rn(v.x, scale.x), rows.scale[h]),
                        __fmul_rn(__fmul_rn(v.y, scale.y), rows.scale[h]));
      }
      if (p.factors.bias != nullptr) v = make_float2(__fadd_rn(v.x, rows.bias[h]), __fadd_rn(v.y, rows.bias[h]));
      return squares_above(T{}, p.threshold, v);
    };
    if (kFp8 && p.factors.scale_y != nullptr) {
      store_exchanged<Tile>(static_cast<uint8_t*>(p.y), walk.rows, first, end, tokens, threads, exchange,
                            [&](int j, int h) {
                              const float2 v = squared(j, h), inverse = of_two(1, j);
                              return uint32_t(to_e4m3x2(__fmul_rn(v.x, inverse.x), __fmul_rn(v.y, inverse.y)));
                            });
    } else {
      store_exchanged<Tile>(static_cast<uint16_t*>(p.y), walk.rows, first, end, tokens, threads, exchange,
                            [&](int j, int h) {
                              const float2 v = squared(j, h);
                              return pack2(T{}, v.x, v.y);
                            });
    }
  }

 private:
  __device__ __forceinline__ float2 of_two(int which, int j) const {
    return *reinterpret_cast<const float2*>(shared.of_tokens[which] + DensePlace().token + 8 * j);
  }
};

// The sums of the slices of K, of each of which a block of a cluster has one. They are added in order, each block some.
template <class Tile, int kSumSlices>
struct DenseSum {
  static_assert(kSumSlices > 1);  // so that a block has one unit
  using Params = DenseSumParams;
  static constexpr bool kFp8 = sizeof(typename Tile::Element) == 1;
  static constexpr bool kInRing = true;

  const Params& p;
  typename Tile::Shared& shared;  // of tokens: scales of y; of rows: scales and biases

  __device__ __forceinline__ void prepare(int tokens, int threads) const {
    if constexpr (kFp8) {
      for (int t = threadIdx.x; t < tokens; t += threads) {
        shared.of_tokens[0][t] = usable_scale(p.factors.scale_y[p.factors.scale_y_per_token ? t : 0]);
      }
    }
  }
  __device__ __forceinline__ void begin(int first, int end) const {
    load_row_factors(p.factors, p.out_is_half, shared, first, end);
  }

  // The block has one unit, so that nothing is on its way to the ring, in whose place are the sums: [tokens, pitch].
  __device__ __forceinline__ void finish(const DenseWalk& walk, int unit, int tokens, int threads,
                                         unsigned char* exchange, float (&c)[Tile::kValues]) const {
    const DensePlace place;
    const int pitch = Tile::sums_pitch(threads / 128);
    auto* sums = reinterpret_cast<float*>(exchange);
    wait_for_warpgroups(threads);     // all of them have multiplied
    if constexpr (Tile::kOfTokens) {  // columns are rows of the weight, two beside each other
#pragma unroll
      for (int i = 0; i < Tile::kValues; i += 2) {
        float* const to = sums + (place.row + i / 2 % 2 * 8) * pitch + place.token + i / 4 * 8;
        *reinterpret_cast<float2*>(to) = make_float2(c[i], c[i + 1]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < Tile::kValues; ++i) {
        const int token = place.token + i / 4 * 8 + i % 2;
        sums[token * pitch + place.row + i / 2 % 2 * 8] = c[i];
      }
    }
    wait_for_cluster();
    const int first = walk.first_row(walk.tile(unit)), columns = walk.first_row(walk.tile(unit) + 1) - first;
    const int eights = (columns + 7) / 8;
    for (int i = walk.slice(unit) * threads + threadIdx.x; i < tokens * eights; i += kSumSlices * threads) {
      const int token = i / eights, column = i % eights * 8;
      float added[8] = {};
      float4 of_slices[kSumSlices][2];
#pragma unroll
      for (int s = 0; s < kSumSlices; ++s) {
        const uint32_t there = in_block_of_cluster(shared_address(sums + token * pitch + column), s);
        of_slices[s][0] = load_of_cluster4(there);
        of_slices[s][1] = load_of_cluster4(there + 16);
      }
#pragma unroll
      for (int s = 0; s < kSumSlices; ++s) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float4 v = of_slices[s][half];
          float* const to = added + 4 * half;
          to[0] += v.x, to[1] += v.y, to[2] += v.z, to[3] += v.w;
        }
      }
      uint16_t bits[8];
#pragma unroll
      for (int r = 0; r < 8; ++r) {
        float sum = added[r];
        if constexpr (kFp8) {
          sum = __fmul_rn(__fmul_rn(sum, shared.of_tokens[0][token]), shared.of_rows[0][column + r]);
        }
        if (p.factors.bias != nullptr) sum = __fadd_rn(sum, shared.of_rows[1][column + r]);
        bits[r] = p.out_is_half ? to_bits(__half{}, sum) : to_bits(__nv_bfloat16{}, sum);
      }
      uint16_t* const out = static_cast<uint16_t*>(p.out) + int64_t{token} * walk.rows + first + column;
      if (walk.rows % 8 == 0) {
        store16(out, pack16(bits[0], bits[1]), pack16(bits[2], bits[3]), pack16(bits[4], bits[5]),
                pack16(bits[6], bits[7]));
      } else {
#pragma unroll
        for (int r = 0; r < 8; ++r) {
          if (column + r < columns) out[r] = bits[r];
        }
      }
    }
    wait_for_cluster();  // none leaves while others read its sums
  }
};

template <class Tile, class Sink>
__global__ void __launch_bounds__(Tile::kMaxThreads, 1)
    dense_few_kernel(const __grid_constant__ DenseLaunch<typename Sink::Params> launch) {
  extern __shared__ __align__(1024) unsigned char bytes[];
  auto& shared = *reinterpret_cast<typename Tile::Shared*>(bytes);
  const DenseWalk& walk = launch.walk;
  const int warpgroups = Tile::warpgroups(walk), warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0);
  const int threads = warpgroups * 128;
  const DenseRing<Tile> ring{(shared_address(&shared + 1) + 1023) / 1024 * 1024,
                             launch.stages,
                             Tile::w_box(walk.box_rows),
                             Tile::stage(walk.box_rows),
                             shared.full,
                             shared.empty};
  if (!launch.dependent) wait_for_predecessors();
  if (threadIdx.x == 0) ring.initialise(warpgroups * 4);
  if (warp == warpgroups * 4 && threadIdx.x % 32 == 0) {
    prefetch_map(&launch.w);
    prefetch_map(&launch.x);
  }
  __syncthreads();
  launch_dependents();
  if (warp == warpgroups * 4) {
    if (threadIdx.x % 32 == 0) DenseCopies<Tile, DenseLaunch<typename Sink::Params>>(launch, ring).run();
    return;
  }
  Sink sink{launch.params, shared};
  wait_for_predecessors();
  sink.prepare(launch.tokens, threads);
  wait_for_warpgroups(threads);
  unsigned char* const exchange =
      bytes + (ring.stages_at - shared_address(bytes)) + (Sink::kInRing ? 0 : launch.stages * ring.stage_bytes);
  int stage = 0, phase = 0;
  for (int unit = blockIdx.x; unit < walk.units(); unit += gridDim.x) {
    const int tile = walk.tile(unit), slice = walk.slice(unit);
    sink.begin(walk.first_row(tile), walk.first_row(tile + 1));
    float c[Tile::kValues] = {};
    multiply_unit<Tile>(ring, warp / 4, walk.first_chunk(slice + 1) - walk.first_chunk(slice), stage, phase, c);
    sink.finish(walk, unit, launch.tokens, threads, exchange, c);
  }
}

}  // namespace sparse24::cuda
