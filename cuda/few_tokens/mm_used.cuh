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

// Steps of a group, on their way through its ring. A row that is not copied is one from before, or zeros: its y are
// zeros.
template <class W, class Tile>
struct UsedRing {
  static constexpr int kRowsOfCopy = 32 / Tile::kPieces, kWarpRows = kStepNeurons / 4;
  static constexpr int kYCopies = (Tile::kTokens * 4 + Tile::kGroupThreads - 1) / Tile::kGroupThreads;

  const uint8_t* used;
  int next, end;  // steps
  const char* w;  // this lane's piece of its first row of the next step
  int64_t row_bytes;
  const uint16_t* y;            // this thread's first piece of the next step
  int64_t y_bytes;              // between its pieces
  bool has_w, has_y[kYCopies];  // whether these pieces exist
  uint32_t ring, w_at, y_at;    // in shared memory; of this thread in a stage
  int stage = 0;
  uint32_t bits = 0, next_bits = 0;  // of used neurons: a step for each lane

  __device__ __forceinline__ UsedRing(const UsedLaunch& launch, int first, int end, int column0, uint32_t ring)
      : used(launch.neurons.used), next(first), end(end), ring(ring) {
    const MmActiveArgs& args = launch.args;
    const int thread = threadIdx.x % Tile::kGroupThreads, lane = threadIdx.x % 32, piece = lane % Tile::kPieces;
    const int row0 = thread / 32 * kWarpRows + lane / Tile::kPieces;
    const int64_t neuron0 = int64_t{first} * kStepNeurons;
    row_bytes = args.out_features * int(sizeof(W));
    w = static_cast<const char*>(args.w) + (neuron0 + row0) * row_bytes + column0 * int(sizeof(W)) + piece * 16;
    has_w = column0 * int(sizeof(W)) + piece * 16 < row_bytes;
    w_at = at(row0, piece);
    y = launch.neurons.y + thread / 4 * launch.neurons.pitch + neuron0 + thread % 4 * 8;
    y_bytes = Tile::kGroupThreads / 4 * launch.neurons.pitch * 2;
#pragma unroll
    for (int i = 0; i < kYCopies; ++i) has_y[i] = (thread + i * Tile::kGroupThreads) / 4 < int(args.tokens);
    y_at = kStepNeurons * Tile::kRowBytes + thread * 16;
  }

  // The bits of a step for each lane.
  __device__ __forceinline__ uint32_t fetch(int from) const {
    const int step = from + int(threadIdx.x % 32);
    if (step >= end) return 0;
    const auto* at = reinterpret_cast<const uint4*>(used + int64_t{step} * kStepNeurons);
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
  // `index`: of the step. What does not exist in a stage that was never copied to (kFirst) are zeros.
  template <bool kFirst>
  __device__ __forceinline__ void copy(int index) {
    const auto copy16 = [](uint32_t exists, uint32_t to, const void* from) {
      kFirst ? copy16_if_else_zeros(exists, to, from) : copy16_if(exists, to, from);
    };
    if (next < end) {
      const uint32_t to = ring + stage * Tile::kStageBytes, of_step = __shfl_sync(0xffffffffu, bits, index % 32);
      const uint32_t rows = has_w ? of_step >> threadIdx.x % Tile::kGroupThreads / 32 * kWarpRows : 0;
      const uint32_t of_lane = rows >> threadIdx.x % 32 / Tile::kPieces;
      const char* from = w;
#pragma unroll
      for (int i = 0; i < kWarpRows; i += kRowsOfCopy, from += kRowsOfCopy * row_bytes) {
        // Rows of a warp differ in their last three bits alone: exchanged pieces, in the last one.
        copy16(of_lane & 1u << i, to + (w_at ^ i % 2 * 16) + i * Tile::kRowBytes, from);
      }
#pragma unroll
      for (int i = 0; i < kYCopies; ++i) {
        if (Tile::kTokens * 4 < Tile::kGroupThreads && threadIdx.x % Tile::kGroupThreads >= Tile::kTokens * 4) continue;
        copy16(has_y[i], to + y_at + i * Tile::kGroupThreads * 16, reinterpret_cast<const char*>(y) + i * y_bytes);
      }
      w += kStepNeurons * row_bytes;
      y += kStepNeurons;
      ++next;
      if (index % 32 == 31) {
        bits = next_bits;
        next_bits = fetch(next + 32);
      }
    }
    commit_copies();
    stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
  }
};

template <class Y, class W, int kEights>
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

  // The last stage is copied to by the loop.
  auto* last = reinterpret_cast<uint4*>(shared + (group * Tile::kStages + Tile::kStages - 1) * Tile::kStageBytes);
  for (int i = thread; i < Tile::kStageBytes / 16; i += Tile::kGroupThreads) last[i] = uint4{0, 0, 0, 0};
  const int first = int(steps * slice / slices), end = int(steps * (slice + 1) / slices);
  UsedRing<W, Tile> ring(launch, first, end, column0, ring_at);
  wait_for_predecessors();
  ring.bits = ring.fetch(first);
  ring.next_bits = ring.fetch(first + 32);
#pragma unroll 1
  for (int s = 0; s < Tile::kStages - 1; ++s) ring.template copy<true>(s);
  launch_dependents();  // small blocks, which find a place beside those of this kernel

  // Of mma's 16 factors lane q has those of neurons 8 q + 4 s to 8 q + 4 s + 3 in half s of a step: 16 bytes of y.
  const int of_matrix = lane % 8, neuron = of_matrix / 2 * 8 + of_matrix % 2;
  const int high = sizeof(W) == 2 ? lane / 16 : lane / 8 % 2;  // of the factors
  const int piece = warp * (Tile::kPieces / 4) + (sizeof(W) == 2 ? lane / 8 % 2 : lane / 16);
  const uint32_t w_lane = (neuron + 2 * high) * Tile::kRowBytes;
  float c[kTiles][kEights][4] = {};
  int stage = 0;
#pragma unroll 1
  for (int step = first; step < end; ++step) {
    wait_for_copies<Tile::kStages - 2>();
    wait_at_barrier<Tile::kGroupThreads>(group + 1);
    ring.template copy<false>(step - first + Tile::kStages - 1);
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
