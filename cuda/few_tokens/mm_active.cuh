// The kernel of mm_active: each warp gathers the rows of w that its tokens use, straight into registers.
#pragma once

#include <type_traits>

#include "few_tokens/asynchronous.cuh"
#include "few_tokens/weights.cuh"
#include "sparse24/mm_active.h"

namespace sparse24::cuda {

// A warp has 32 * kVec columns of w, kTokens tokens and one slice of the neurons. kVectors: rows of w can be loaded
// kVec elements at a time.
template <int kVec_, int kTokens_, bool kVectors_>
struct ActiveTile {
  static constexpr int kVec = kVec_, kTokens = kTokens_;
  static constexpr bool kVectors = kVectors_;
  static constexpr int kBlocks = 8;  // of a cluster; each has a slice for each warp
  static constexpr int kWarps = int(kActiveSlices) / kBlocks, kThreads = 32 * kWarps;
  static constexpr int kColumns = 32 * kVec;
  // Blocks of a multiprocessor, at least: with one, clusters of eight do not fill all of them at once.
  static constexpr int kResident = 2;
  static constexpr int kListed = kTokens < 8 ? 512 : 256;  // neurons that are listed at a time
};

// What a warp knows of its active neurons, in ascending order, and of some more without an activation behind them.
template <class Tile>
struct ActiveList {
  static constexpr int kPadding = 16;
  alignas(16) float y[Tile::kListed + kPadding][Tile::kTokens];
  uint16_t neuron[Tile::kListed + kPadding];
};

template <class Tile>
union ActiveStorage {
  ActiveList<Tile> lists[Tile::kWarps];
  alignas(16) float sums[Tile::kWarps][Tile::kTokens][Tile::kColumns];  // when all is multiplied
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

// Appends the neurons of `first` .. `end`, at most 256, that some of the tokens use; `count` are there.
template <class Y, class Tile>
__device__ __forceinline__ int list_active(const uint16_t* y, int tokens, int64_t features, int64_t first, int64_t end,
                                           bool words, int count, ActiveList<Tile>& list, int position) {
  constexpr int kTokens = Tile::kTokens;
  const int lane = threadIdx.x % 32;
  const int64_t mine = first + 8 * lane;
  uint32_t values[kTokens][4] = {}, any[4] = {};  // of eight neurons
  if (words) {
    if (mine < end) {
      // All tokens that a warp can have, so that no load waits for another; those that are not there are the last one.
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const uint4 v = *reinterpret_cast<const uint4*>(y + min(t, tokens - 1) * features + mine);
        values[t][0] = v.x, values[t][1] = v.y, values[t][2] = v.z, values[t][3] = v.w;
      }
    }
  } else {
    for (int i = 0; i < 8 && mine + i < end; ++i) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const uint32_t bits = y[min(t, tokens - 1) * features + mine + i];
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) values[t][pair] |= i / 2 == pair ? bits << (i % 2 * 16) : 0;
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) any[i] |= values[t][i];
  }
  uint32_t used = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) used |= uint32_t((any[i / 2] & (i % 2 ? 0x7fff0000u : 0x7fffu)) != 0) << i;

  int upto = __popc(used);
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(0xffffffffu, upto, step);
    if (lane >= step) upto += before;
  }
  int at = count + upto - __popc(used);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if ((used >> i & 1) == 0) continue;
    list.neuron[at] = uint16_t(position + 8 * lane + i);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      list.y[at][t] = to_float(Y{}, uint16_t(values[t][i / 2] >> (i % 2 * 16)));
    }
    ++at;
  }
  return count + __shfl_sync(0xffffffffu, upto, 31);
}

// kVec elements of a row of w, from column `column` on; zeros where there are none.
template <class W, class Tile>
__device__ __forceinline__ void load_columns(const W* row, int64_t column, int64_t columns,
                                             uint32_t (&words)[Tile::kVec * int(sizeof(W)) / 4]) {
  constexpr int kWords = Tile::kVec * int(sizeof(W)) / 4;
  if constexpr (Tile::kVectors) {
    if (column >= columns) return;
    const W* from = row + column;
    if constexpr (kWords == 4) {
      asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                   : "l"(from));
    } else if constexpr (kWords == 2) {
      asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(from));
    } else {
      asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(words[0]) : "l"(from));
    }
  } else {
    using Bits = std::conditional_t<sizeof(W) == 2, uint16_t, uint8_t>;
    constexpr int kPerWord = 4 / int(sizeof(W));
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = 0;
#pragma unroll
    for (int i = 0; i < Tile::kVec; ++i) {
      if (column + i >= columns) break;
      const uint32_t bits = reinterpret_cast<const Bits*>(row)[column + i];
      words[i / kPerWord] |= bits << (i % kPerWord * 8 * int(sizeof(W)));
    }
  }
}

// Block (slices, tile of columns, group of tokens) of a grid whose clusters have all slices. What a token's sum goes
// through depends on nothing but its row of y, and its order on `features` alone.
template <class Y, class W, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident) mm_active_kernel(const MmActiveArgs args) {
  constexpr int kVec = Tile::kVec, kTokens = Tile::kTokens, kWords = kVec * int(sizeof(W)) / 4;
  constexpr int kAhead = kWords == 4 ? 8 : 16;  // rows that are under way
  extern __shared__ __align__(16) unsigned char shared[];
  auto& storage = *reinterpret_cast<ActiveStorage<Tile>*>(shared);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned groups = unsigned(ceil_div(args.tokens, kTokens)), block = blockIdx.x / Tile::kBlocks;
  const int64_t column = int64_t{block / groups} * Tile::kColumns + lane * kVec;
  const int token0 = int(block % groups) * kTokens, tokens = min(kTokens, int(args.tokens) - token0);
  const int64_t slice = active_slice(args.features);
  const int64_t begin = slice * (blockIdx.x % Tile::kBlocks * Tile::kWarps + warp);
  const int64_t end = min(begin + slice, args.features);
  const auto* y = static_cast<const uint16_t*>(args.y) + token0 * args.features;
  const auto* w = static_cast<const W*>(args.w);
  const bool words = args.features % 8 == 0 && reinterpret_cast<uintptr_t>(args.y) % 16 == 0;
  ActiveList<Tile>& list = storage.lists[warp];

  float sums[kTokens][kVec] = {};
  wait_for_predecessors();
  // A row is multiplied for all tokens, whose zeros then add nothing, unless a weight is infinite or NaN: that shows in
  // the sums, and the slice is done again with care.
  for (bool careful = false;; careful = true) {
    for (int64_t first = begin; first < end; first += Tile::kListed) {
      __syncwarp();  // the list is free
      int count = 0;
#pragma unroll 1
      for (int part = 0; part < Tile::kListed && first + part < end; part += 256) {
        count = list_active<Y>(y, tokens, args.features, first + part, min(first + part + 256, end), words, count, list,
                               part);
      }
      __syncwarp();
      if (count == 0) continue;
      const W* rows = w + first * args.out_features;
      const auto load = [&](uint32_t (&to)[kWords], int i) {
        load_columns<W, Tile>(rows + list.neuron[i] * args.out_features, column, args.out_features, to);
      };
      const auto multiply = [&](const uint32_t (&from)[kWords], int i, bool all) {
        float weights[kVec];
        widen<W>(from, weights);
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
          const float factor = list.y[i][t];
          if (!all && factor == 0.f) continue;
#pragma unroll
          for (int v = 0; v < kVec; ++v) sums[t][v] = __fmaf_rn(factor, weights[v], sums[t][v]);
        }
      };
      if (careful) {
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
          uint32_t row[kWords] = {};
          load(row, i);
          multiply(row, i, false);
        }
        continue;
      }

      const int padded = (count + kAhead - 1) / kAhead * kAhead;
      if (count + lane < padded) {
        list.neuron[count + lane] = list.neuron[count - 1];
#pragma unroll
        for (int t = 0; t < kTokens; ++t) list.y[count + lane][t] = 0.f;
      }
      __syncwarp();
      uint32_t ring[kAhead][kWords] = {};
#pragma unroll
      for (int d = 0; d < kAhead; ++d) load(ring[d], d);
      for (int i = kAhead; i < padded; i += kAhead) {
#pragma unroll
        for (int d = 0; d < kAhead; ++d) {
          multiply(ring[d], i - kAhead + d, true);
          load(ring[d], i + d);
        }
      }
#pragma unroll
      for (int d = 0; d < kAhead; ++d) multiply(ring[d], padded - kAhead + d, true);
    }
    if (careful) break;
    bool nan = false;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
#pragma unroll
      for (int v = 0; v < kVec; ++v) nan = nan || sums[t][v] != sums[t][v];
    }
    if (!__any_sync(0xffffffffu, nan)) break;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
#pragma unroll
      for (int v = 0; v < kVec; ++v) sums[t][v] = 0.f;
    }
  }

  __syncthreads();  // lists become sums
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
#pragma unroll
    for (int v = 0; v < kVec; v += 4) {
      *reinterpret_cast<float4*>(&storage.sums[warp][t][lane * kVec + v]) = {sums[t][v], sums[t][v + 1], sums[t][v + 2],
                                                                             sums[t][v + 3]};
    }
  }
  __syncthreads();
  constexpr int kQuads = Tile::kColumns / 4, kAllQuads = kTokens * kQuads;
  auto* quads = reinterpret_cast<float4*>(storage.sums);
  const auto add = [](float4& to, const float4& from) {
    to = {__fadd_rn(to.x, from.x), __fadd_rn(to.y, from.y), __fadd_rn(to.z, from.z), __fadd_rn(to.w, from.w)};
  };
  for (int q = threadIdx.x; q < kAllQuads; q += Tile::kThreads) {
    float4 total{0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int s = 0; s < Tile::kWarps; ++s) add(total, quads[s * kAllQuads + q]);
    quads[q] = total;
  }
  sync_cluster();
  for (int q = int(cluster_rank()) * Tile::kThreads + threadIdx.x; q < tokens * kQuads;
       q += Tile::kBlocks * Tile::kThreads) {
    const int64_t token = token0 + q / kQuads, from = int64_t{block / groups} * Tile::kColumns + q % kQuads * 4;
    if (from >= args.out_features) continue;
    float4 parts[Tile::kBlocks], total{0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int b = 0; b < Tile::kBlocks; ++b) parts[b] = load_cluster4(shared_address(quads + q), b);
#pragma unroll
    for (int b = 0; b < Tile::kBlocks; ++b) add(total, parts[b]);
    const float of_column[4] = {total.x, total.y, total.z, total.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (from + i >= args.out_features) break;
      float v = of_column[i];
      if (args.scale_w != nullptr) v = __fmul_rn(v, args.scale_w[args.scale_w_per_column ? from + i : 0]);
      if (args.bias != nullptr) v = __fadd_rn(v, load_as(args.bias_dtype, args.bias, from + i));
      store_as(args.out_dtype, args.out, token * args.out_features + from + i, v);
    }
  }
  sync_cluster();  // the others may still read the sums of this block
}

}  // namespace sparse24::cuda
