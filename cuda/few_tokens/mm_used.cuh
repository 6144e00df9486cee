// The second product for more than eight tokens: rows of w that a token uses, on tensor cores.
//
// A block has 256 columns and a part of the neurons, each of its two groups of four warps a half of that. A group takes
// 32 neurons a step, with their y, through a ring in shared memory; rows that no token uses are zeros there, and are
// not read. Each neuron has its place in a step whatever the others do, so a row of the result depends on its y alone.
// Sums of groups and of parts are added in order, the latter by a kernel behind.
#pragma once

#include "few_tokens/mm_active.cuh"
#include "few_tokens/mma.cuh"
#include "few_tokens/used_neurons.h"

namespace sparse24::cuda {

struct UsedLaunch {
  MmActiveArgs args;  // whose y is that of `neurons`
  UsedNeurons neurons;
  float* sums;  // [parts][tokens][out_features]
  int parts;
};

template <class W, int kEights_>
struct UsedTile {
  static constexpr int kEights = kEights_, kTokens = 8 * kEights, kColumns = 256;
  static constexpr int kGroups = 2, kGroupThreads = 128, kThreads = kGroups * kGroupThreads;
  static constexpr int kWarpColumns = kColumns / 4, kTiles = kWarpColumns / 16;
  static constexpr int kRowBytes = kColumns * int(sizeof(W)), kPieces = kRowBytes / 16;
  static constexpr int kYBytes = kTokens * kStepNeurons * 2, kStageBytes = kStepNeurons * kRowBytes + kYBytes;
  static constexpr int kMostStages = 220 * 1024 / kGroups / kStageBytes;
  static constexpr int kStages = kMostStages < 12 ? kMostStages : 12;
  static constexpr int kSharedBytes = kGroups * kStages * kStageBytes;
  static_assert(kTiles * kEights * 4 * kGroupThreads * 4 <= kSharedBytes);  // sums of a group
};

__device__ __forceinline__ uint4 load_transposed(uint32_t address) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// 16 bytes, of which only the first `exist` are read: the others are zeros.
__device__ __forceinline__ void copy16_of(uint32_t exist, uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(exist) : "memory");
}

// The warps of a group wait for each other.
template <int kThreads>
__device__ __forceinline__ void wait_for_group(int group) {
  if (group == 0) {
    asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
  } else {
    asm volatile("bar.sync 2, %0;" ::"n"(kThreads) : "memory");
  }
}

// A fragments of two tiles of 16 columns and 16 neurons of float8 weights. What a lane has loaded are two neighbouring
// columns of two neurons: the first columns of all lanes are rows 0 to 7 of the product, the second ones 8 to 15.
template <class P>
__device__ __forceinline__ void to_column_fragments(const uint4& v, uint32_t (&a)[2][4]) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t by_column = __byte_perm(words[i], 0, 0x3120);
    a[i / 2][i % 2 * 2] = e4m3x2_to_pair(P{}, uint16_t(by_column));
    a[i / 2][i % 2 * 2 + 1] = e4m3x2_to_pair(P{}, uint16_t(by_column >> 16));
  }
}

// Steps of a group, on their way through its ring.
template <class W, class Tile>
struct UsedRing {
  const UsedNeurons& neurons;
  const char* w;  // the block's first column
  int64_t row_bytes, features;
  int tokens, first, end;  // steps
  int bytes;               // of the block's columns that exist
  uint32_t ring;           // in shared memory
  int copied = 0, stage = 0;
  uint32_t bits = 0, next_bits = 0;  // of used neurons: a step for each lane

  // The bits of a step for each lane.
  __device__ __forceinline__ uint32_t fetch(int from) const {
    const int step = from + int(threadIdx.x % 32);
    if (step >= end) return 0;
    const auto* at = reinterpret_cast<const uint4*>(neurons.used + int64_t{step} * kStepNeurons);
    const uint4 low = __ldcg(at), high = __ldcg(at + 1);
    const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    uint32_t all = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) all |= words[i] * 0x10204080u >> 28 << 4 * i;
    return all;
  }
  // Pieces of neighbouring rows are exchanged, so that eight lanes of load_transposed meet no bank twice.
  __device__ __forceinline__ static uint32_t at(int row, int piece) {
    return row * Tile::kRowBytes + (piece ^ ((row & 1) | row >> 3 << 1)) * 16;
  }
  // The rows of a step that `used` names.
  __device__ __forceinline__ void copy_rows(int step, uint32_t used) const {
    constexpr int kRowsOfCopy = 32 / Tile::kPieces, kWarpRows = kStepNeurons / 4;
    const int lane = threadIdx.x % 32, piece = lane % Tile::kPieces;
    const int row0 = threadIdx.x % Tile::kGroupThreads / 32 * kWarpRows + lane / Tile::kPieces;
    const uint32_t to = ring + stage * Tile::kStageBytes, exist = max(0, min(16, bytes - piece * 16));
    const char* from = w + (int64_t{step} * kStepNeurons + row0) * row_bytes + piece * 16;
#pragma unroll
    for (int i = 0; i < kWarpRows; i += kRowsOfCopy) {
      copy16_of(used >> (row0 + i) & 1 ? exist : 0, to + at(row0 + i, piece), from + i * row_bytes);
    }
  }
  __device__ __forceinline__ void copy_y(int step) const {
    constexpr int kYPieces = Tile::kTokens * 4;
    const int64_t neuron0 = int64_t{step} * kStepNeurons;
    const uint32_t to = ring + stage * Tile::kStageBytes + kStepNeurons * Tile::kRowBytes;
#pragma unroll
    for (int i = 0; i < kYPieces; i += Tile::kGroupThreads) {
      const int at = threadIdx.x % Tile::kGroupThreads + i, token = at / 4, of_token = at % 4 * 8;
      if (kYPieces % Tile::kGroupThreads != 0 && at >= kYPieces) continue;
      const int64_t left = features - neuron0 - of_token;
      const uint32_t exist = token < tokens ? uint32_t(max(int64_t{0}, min(int64_t{8}, left))) * 2 : 0;
      copy16_of(exist, to + at * 16, neurons.y + (exist > 0 ? token * neurons.pitch + neuron0 + of_token : 0));
    }
  }
  __device__ __forceinline__ void advance() {
    commit_copies();
    stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
  }
  __device__ __forceinline__ void copy() {
    const int step = first + copied;
    if (step < end) {
      copy_rows(step, __shfl_sync(0xffffffffu, bits, copied % 32));
      copy_y(step);
      if (++copied % 32 == 0) {
        bits = next_bits;
        next_bits = fetch(first + copied + 32);
      }
    }
    advance();
  }
  // Fills the ring. Weights do not depend on the kernel in front: all rows of the first steps are asked for before it
  // is complete.
  template <bool kEager>
  __device__ __forceinline__ void begin() {
    if constexpr (kEager) {
#pragma unroll 1
      for (int s = 0; s < Tile::kStages - 1; ++s, ++stage) {
        const int64_t left = features - int64_t{first + s} * kStepNeurons;
        if (first + s < end) copy_rows(first + s, left >= kStepNeurons ? ~0u : (1u << left) - 1);
      }
      stage = 0;
    }
    wait_for_predecessors();
    bits = fetch(first);
    next_bits = fetch(first + 32);
#pragma unroll 1
    for (int s = 0; s < Tile::kStages - 1; ++s) {
      if constexpr (kEager) {
        if (first + s < end) copy_y(first + s);
        copied += first + s < end;
        advance();
      } else {
        copy();
      }
    }
  }
};

template <class Y, class W, int kEights, bool kEager = true>
__global__ void __launch_bounds__(UsedTile<W, kEights>::kThreads, 1) mm_used_kernel(const UsedLaunch launch) {
  using Tile = UsedTile<W, kEights>;
  constexpr int kTiles = Tile::kTiles;
  const MmActiveArgs& args = launch.args;
  extern __shared__ __align__(16) unsigned char shared[];
  const int thread = threadIdx.x % Tile::kGroupThreads, group = threadIdx.x / Tile::kGroupThreads;
  const int lane = threadIdx.x % 32, warp = thread / 32, g = lane / 4, q = lane % 4;
  const int part = blockIdx.x % launch.parts, column0 = blockIdx.x / launch.parts * Tile::kColumns;
  const int out_features = int(args.out_features), tokens = int(args.tokens);
  const int64_t steps = ceil_div(args.features, int64_t{kStepNeurons});
  const int64_t slice = int64_t{part} * Tile::kGroups + group, slices = int64_t{launch.parts} * Tile::kGroups;
  const uint32_t ring_at = shared_address(shared) + group * (Tile::kStages * Tile::kStageBytes);

  UsedRing<W, Tile> ring{launch.neurons,
                         static_cast<const char*>(args.w) + int64_t{column0} * int(sizeof(W)),
                         int64_t{out_features} * int(sizeof(W)),
                         args.features,
                         tokens,
                         int(steps * slice / slices),
                         int(steps * (slice + 1) / slices),
                         (out_features - column0) * int(sizeof(W)),
                         ring_at};
  ring.template begin<kEager>();

  // Of mma's 16 factors lane q has those of neurons 8 q + 4 s to 8 q + 4 s + 3 in half s of a step: 16 bytes of y.
  const int of_matrix = lane % 8, neuron = of_matrix / 2 * 8 + of_matrix % 2;
  const int high = sizeof(W) == 2 ? lane / 16 : lane / 8 % 2;  // of the factors
  const int piece = warp * (Tile::kPieces / 4) + (sizeof(W) == 2 ? lane / 8 % 2 : lane / 16);
  const uint32_t w_lane = (neuron + 2 * high) * Tile::kRowBytes;
  float c[kTiles][kEights][4] = {};
  int stage = 0;
  for (int step = ring.first; step < ring.end; ++step) {
    wait_for_copies<Tile::kStages - 2>();
    wait_for_group<Tile::kGroupThreads>(group);
    ring.copy();
    const uint32_t from = ring_at + stage * Tile::kStageBytes, y_from = from + kStepNeurons * Tile::kRowBytes;
    // Of many tokens registers hold half a step at a time.
    constexpr bool kWhole = kEights < 8;
    uint4 y[kWhole ? kEights : 1];
    if constexpr (kWhole) {
#pragma unroll
      for (int e = 0; e < kEights; ++e) y[e] = load_shared4(y_from + (8 * e + g) * (kStepNeurons * 2) + q * 16);
    }
#pragma unroll(kWhole ? 2 : 1)
    for (int s = 0; s < 2; ++s) {
      const auto load = [&](int of_warp) {
        return load_transposed(from + w_lane + 4 * s * Tile::kRowBytes + ((piece + of_warp) ^ of_matrix) * 16);
      };
      uint32_t a[kTiles][4];
      if constexpr (sizeof(W) == 2) {
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          const uint4 v = load(2 * t);
          a[t][0] = v.x;
          a[t][1] = v.y;
          a[t][2] = v.z;
          a[t][3] = v.w;
        }
      } else {
#pragma unroll
        for (int t = 0; t < kTiles; t += 2) {
          uint32_t both[2][4];
          to_column_fragments<Y>(load(t), both);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            a[t][i] = both[0][i];
            a[t + 1][i] = both[1][i];
          }
        }
      }
#pragma unroll
      for (int e = 0; e < kEights; ++e) {
        uint2 half;
        if constexpr (kWhole) {
          half = s == 0 ? uint2{y[e].x, y[e].y} : uint2{y[e].z, y[e].w};
        } else {
          half = load_shared2(y_from + (8 * e + g) * (kStepNeurons * 2) + q * 16 + s * 8);
        }
#pragma unroll
        for (int t = 0; t < kTiles; ++t) multiply(Y{}, c[t][e], a[t], half.x, half.y);
      }
    }
    stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
  }

  // ---- the second group's sums to the first, and from there to memory ----
  launch_dependents();
  wait_for_copies<0>();
  __syncthreads();
  auto* sums = reinterpret_cast<float4*>(shared) + thread;
  if (group == 1) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int e = 0; e < kEights; ++e) {
        const float (&v)[4] = c[t][e];
        sums[(t * kEights + e) * Tile::kGroupThreads] = {v[0], v[1], v[2], v[3]};
      }
    }
  }
  __syncthreads();
  if (group == 1) return;
#pragma unroll
  for (int e = 0; e < kEights; ++e) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const float4 other = sums[(t * kEights + e) * Tile::kGroupThreads];
      const float v[4] = {__fadd_rn(c[t][e][0], other.x), __fadd_rn(c[t][e][1], other.y),
                          __fadd_rn(c[t][e][2], other.z), __fadd_rn(c[t][e][3], other.w)};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = 8 * e + 2 * q + i % 2;
        const int of_tile = sizeof(W) == 2 ? g + i / 2 * 8 : 2 * g + i / 2;
        const int column = column0 + warp * Tile::kWarpColumns + 16 * t + of_tile;
        if (token >= tokens || column >= out_features) continue;
        __stcg(launch.sums + (int64_t{part} * tokens + token) * out_features + column, v[i]);
      }
    }
  }
}

// ---- the sums of parts ----

struct UsedSumTile {
  static constexpr int kThreads = 128, kBatch = 8;
};

// The sum of a token and column by mm_active's chains: a lane has four slices of the neurons.
template <class Y, class W>
__device__ __noinline__ float chain_sum(const UsedLaunch& launch, int64_t token, int64_t column) {
  constexpr int kOfLane = int(kActiveSlices) / 32, kLanesOfPart = int(kActivePart) / kOfLane;
  const MmActiveArgs& args = launch.args;
  const uint16_t* y = launch.neurons.y + token * launch.neurons.pitch;
  float chains[kOfLane];
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    const int64_t slice = int64_t{threadIdx.x % 32} * kOfLane + i, end = active_slice(args.features, slice + 1);
    chains[i] = 0.f;
    for (int64_t f = active_slice(args.features, slice); f < end; ++f) {
      const float factor = to_float(Y{}, __ldcg(y + f));
      const int64_t at = f * args.out_features + column;
      float weight;
      if constexpr (sizeof(W) == 2) {
        weight = to_float(W{}, static_cast<const uint16_t*>(args.w)[at]);
      } else {
        weight = widen2(__half{}, e4m3x2_to_half2(static_cast<const uint8_t*>(args.w)[at])).x;
      }
      if (factor != 0.f) chains[i] = __fmaf_rn(factor, weight, chains[i]);
    }
  }
  float total = 0.f;
#pragma unroll 1
  for (int part = 0; part < 32; part += kLanesOfPart) {
    float sum = 0.f;
#pragma unroll
    for (int lane = 0; lane < kLanesOfPart; ++lane) {
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) sum = __fadd_rn(sum, __shfl_sync(0xffffffffu, chains[i], part + lane));
    }
    total = __fadd_rn(total, sum);
  }
  return total;
}

// A thread has a column of a token. Where a sum is not finite, it may be because a zero met an infinite weight: then it
// is added up again without zeros.
template <class Y, class W>
__global__ void __launch_bounds__(UsedSumTile::kThreads) add_used_sums_kernel(const UsedLaunch launch) {
  const MmActiveArgs& args = launch.args;
  const int64_t out_features = args.out_features, all = args.tokens * out_features;
  const int64_t i = int64_t{blockIdx.x} * UsedSumTile::kThreads + threadIdx.x;
  wait_for_predecessors();
  float total = 0.f;
  for (int part = 0; part < launch.parts; part += UsedSumTile::kBatch) {
    float sums[UsedSumTile::kBatch];
#pragma unroll
    for (int p = 0; p < UsedSumTile::kBatch; ++p) {
      sums[p] = part + p < launch.parts && i < all ? __ldcg(launch.sums + (part + p) * all + i) : 0.f;
    }
#pragma unroll
    for (int p = 0; p < UsedSumTile::kBatch; ++p) {
      if (part + p < launch.parts) total = __fadd_rn(total, sums[p]);
    }
  }
  const int64_t token = i / out_features;
  const int column = int(i % out_features);
  uint32_t again = __ballot_sync(0xffffffffu, !(fabsf(total) < INFINITY));
  while (again != 0) {
    const int lane = __ffs(int(again)) - 1;
    again &= again - 1;
    const float sum =
        chain_sum<Y, W>(launch, __shfl_sync(0xffffffffu, token, lane), __shfl_sync(0xffffffffu, column, lane));
    if (int(threadIdx.x % 32) == lane) total = sum;
  }
  if (i >= all) return;
  if (args.scale_w != nullptr) total = __fmul_rn(total, args.scale_w[args.scale_w_per_column ? column : 0]);
  if (args.bias != nullptr) total = __fadd_rn(total, load_as(args.bias_dtype, args.bias, column));
  store_as(args.out_dtype, args.out, token * out_features + column, total);
}

}  // namespace sparse24::cuda
