// The kernels of mm_active: rows of w that tokens use, as lists name them.
//
// A warp has up to 256 columns, eight tokens and a slice of the neurons, a block sixteen slices, and a kernel behind
// adds up what blocks have written. A row comes from memory once, through a ring in shared memory, for all eight
// tokens, each of which has a chain of multiply-adds in up to eight columns of each lane. The whole warp does the same.
#pragma once

#include <type_traits>

#include "common/packed.cuh"
#include "few_tokens/active_lists.cuh"
#include "few_tokens/asynchronous.cuh"
#include "few_tokens/weights.cuh"
#include "sparse24/mm_active.h"

namespace sparse24::cuda {

struct ActiveLaunch {
  MmActiveArgs args;
  ActiveLists lists;
  float* sums;  // of blocks: [kParts][tokens][out_features]
};

// Of the neurons, each of a block.
constexpr int kActiveParts = int(kActiveSlices / kActivePart);

// kOfLane: the columns of a lane.
template <int kOfLane_>
struct ActiveTile {
  static constexpr int kWarps = int(kActivePart), kThreads = 32 * kWarps;
  static constexpr int kOfLane = kOfLane_, kColumns = 32 * kOfLane;
  static constexpr int kFirst = kOfLane == 6 ? 4 : kOfLane;  // beside each other; the others are behind those of all
  static constexpr int kParts = kActiveParts;
  static constexpr int kTokens = kListTokens;   // of a block
  static constexpr int kRows = 4, kStages = 4;  // of w that are copied at once, and such copies under way
  // For each row its values, and for each warp the ring.
  static constexpr int kValueBytes = kStages * kRows * int(sizeof(uint4));

  // This lane's first column, and the first one of the others.
  __device__ __forceinline__ static int first() { return int(threadIdx.x) % 32 * kFirst; }
  __device__ __forceinline__ static int others() { return 32 * kFirst + int(threadIdx.x) % 32 * (kOfLane - kFirst); }
  static constexpr int64_t shared_bytes(int64_t tokens, int weight_bytes) {
    const int64_t ring = int64_t{kWarps} * (kValueBytes + kStages * kRows * kColumns * weight_bytes);
    const int64_t sums = (tokens < kTokens ? tokens : kTokens) * kWarps * kColumns * 4;
    return ring < sums ? sums : ring;
  }
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

// The rows that a list names, on their way through a warp's ring.
template <class W, class Tile, bool kVectors>
struct ActiveRing {
  static_assert(kVectors || Tile::kOfLane == 8);
  static constexpr int kRowBytes = Tile::kColumns * int(sizeof(W)), kStageBytes = Tile::kRows * kRowBytes;
  static constexpr int kPieces = kRowBytes / 16, kOfCopy = 32 / kPieces;  // of a row; rows that lanes copy at once

  const uint32_t* neurons;  // of the list
  const uint4* values;
  const char* w;  // of the slice's first row, the block's first column
  uint32_t row_bytes;
  int columns, capacity, count;  // of w from the first one of the block on; of the list
  uint32_t values_at, rows_at;   // in shared memory
  uint32_t now, next;            // a neuron for each lane: of the next rows, and of those behind them
  int copied = 0, stage = 0;     // rows; of the next copy

  // The neurons from one row on: one for each lane.
  __device__ __forceinline__ uint32_t fetch(int from) const {
    const int i = from + int(threadIdx.x % 32);
    return i < capacity ? __ldcg(neurons + i) : 0;
  }
  __device__ __forceinline__ void begin() {
    now = fetch(0);
    next = fetch(32);
  }
  __device__ __forceinline__ void copy() {
    if (copied < count) {
      const int lane = threadIdx.x % 32, left = count - copied, in_lanes = copied % 32;
      if (lane < Tile::kRows) {
        copy16_or_zeros(lane < left, values_at + (stage * Tile::kRows + lane) * 16,
                        values + min(copied + lane, capacity - 1));
      }
      const uint32_t to = rows_at + stage * kStageBytes;
      if constexpr (kVectors) {
        const int of_copy = lane / kPieces, byte = lane % kPieces * 16;
        const bool exists = byte < columns * int(sizeof(W)) && (32 % kPieces == 0 || of_copy < kOfCopy);
#pragma unroll
        for (int i = 0; i < Tile::kRows; i += kOfCopy) {
          const char* from = w + byte + uint64_t{row_bytes} * __shfl_sync(0xffffffffu, now, in_lanes + i + of_copy);
          copy16_if(exists && i + of_copy < left, to + (i + of_copy) * kRowBytes + byte, from);
        }
      } else {
        for (int i = 0; i < Tile::kRows; ++i) {
          const char* from = w + uint64_t{row_bytes} * __shfl_sync(0xffffffffu, now, in_lanes + i);
          if (i < left) copy_elements(to + i * kRowBytes, from);
        }
      }
      copied += Tile::kRows;
      if (copied % 32 == 0) {
        now = next;
        next = fetch(copied + 32);
      }
    }
    commit_copies();
    stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
  }
  // This lane's columns of a row that nobody can copy by 16 bytes.
  __device__ __forceinline__ void copy_elements(uint32_t to, const char* from) const {
    const int first = threadIdx.x % 32 * Tile::kOfLane;
    uint32_t words[2 * sizeof(W)] = {};
#pragma unroll
    for (int c = 0; c < Tile::kOfLane; ++c) {
      if (first + c >= columns) continue;
      const uint32_t element = sizeof(W) == 2 ? reinterpret_cast<const uint16_t*>(from)[first + c]
                                              : reinterpret_cast<const uint8_t*>(from)[first + c];
      words[c * int(sizeof(W)) / 4] |= element << c * int(sizeof(W)) % 4 * 8;
    }
#pragma unroll
    for (int i = 0; i < 2 * int(sizeof(W)); i += 2) {
      store_shared2(to + first * int(sizeof(W)) + i * 4, words[i], words[i + 1]);
    }
  }
  // This lane's columns of row i of a stage.
  __device__ __forceinline__ void load(int of_stage, int i, float (&v)[Tile::kOfLane]) const {
    constexpr int kWords = (Tile::kOfLane * int(sizeof(W)) + 3) / 4;
    const uint32_t row = rows_at + of_stage * kStageBytes + i * kRowBytes, at = row + Tile::first() * int(sizeof(W));
    uint32_t words[kWords];
    if constexpr (Tile::kFirst * sizeof(W) == 16) {
      const uint4 four = load_shared4(at);
      words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
    } else if constexpr (Tile::kFirst * sizeof(W) == 8) {
      const uint2 two = load_shared2(at);
      words[0] = two.x, words[1] = two.y;
    } else {
      words[0] = load_shared1(at);
    }
    if constexpr (Tile::kOfLane > Tile::kFirst) {
      const uint32_t others = row + Tile::others() * int(sizeof(W));
      words[kWords - 1] = sizeof(W) == 2 ? load_shared1(others) : load_shared_half(others);
    }
    widen<W>(words, v);
  }
};

template <class Y, class W, class Tile, bool kVectors>
__global__ void __launch_bounds__(Tile::kThreads, 1) mm_active_kernel(const ActiveLaunch launch) {
  using Ring = ActiveRing<W, Tile, kVectors>;
  constexpr int kColumns = Tile::kColumns;
  const MmActiveArgs& args = launch.args;
  const ActiveLists& lists = launch.lists;
  extern __shared__ __align__(16) unsigned char shared[];
  const int warp = threadIdx.x / 32;
  const int part = blockIdx.x % Tile::kParts, slice = part * Tile::kWarps + warp;
  const int block = blockIdx.x / Tile::kParts, group = block % lists.groups, list = slice * lists.groups + group;
  const int column0 = block / lists.groups * kColumns, out_features = int(args.out_features);
  const int64_t row_bytes = int64_t{out_features} * int(sizeof(W)), of_list = int64_t{list} * lists.capacity;
  const uint32_t values_at = shared_address(shared) + warp * Tile::kValueBytes;
  const uint32_t rows_at =
      shared_address(shared) + Tile::kWarps * Tile::kValueBytes + warp * Tile::kStages * Ring::kStageBytes;
  wait_for_predecessors();

  Ring ring{lists.neurons + of_list,
            lists.values + of_list,
            static_cast<const char*>(args.w) + active_slice(args.features, slice) * row_bytes +
                int64_t{column0} * int(sizeof(W)),
            uint32_t(row_bytes),
            out_features - column0,
            lists.capacity,
            __ldcg(lists.counts + list),
            values_at,
            rows_at};
  ring.begin();
#pragma unroll 1
  for (int s = 0; s < Tile::kStages - 1; ++s) ring.copy();
  float c[Tile::kTokens][Tile::kOfLane] = {};
  int stage = 0;
  for (int row = 0; row < ring.count; row += Tile::kRows) {
    wait_for_copies<Tile::kStages - 2>();
    __syncwarp();
    ring.copy();
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) {
      const uint4 y = load_shared4(values_at + (stage * Tile::kRows + i) * 16);
      float w[Tile::kOfLane];
      ring.load(stage, i, w);
      const uint32_t pairs[Tile::kTokens / 2] = {y.x, y.y, y.z, y.w};
#pragma unroll
      for (int p = 0; p < Tile::kTokens / 2; ++p) {
        if (pairs[p] == 0) continue;
        const float2 of_pair = widen2(Y{}, pairs[p]);
        multiply_add_if(of_pair.x, w, c[2 * p]);
        multiply_add_if(of_pair.y, w, c[2 * p + 1]);
      }
    }
    stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
  }

  launch_dependents();
  wait_for_copies<0>();
  __syncthreads();
  auto* sums = reinterpret_cast<float*>(shared);  // [warps][tokens][kColumns], where the rings were
  const int first = group * Tile::kTokens, tokens = min(lists.tokens - first, Tile::kTokens);
  const int of_warp = tokens * kColumns;
#pragma unroll
  for (int t = 0; t < Tile::kTokens; ++t) {
    if (t >= tokens) continue;
    float* const of_token = sums + warp * of_warp + t * kColumns;
    auto* const to = reinterpret_cast<float4*>(of_token + Tile::first());
    to[0] = {c[t][0], c[t][1], c[t][2], c[t][3]};
    if constexpr (Tile::kFirst == 8) to[1] = {c[t][4], c[t][5], c[t][6], c[t][7]};
    if constexpr (Tile::kOfLane == 6) *reinterpret_cast<float2*>(of_token + Tile::others()) = {c[t][4], c[t][5]};
  }
  __syncthreads();
  for (int i = threadIdx.x; i < of_warp; i += Tile::kThreads) {
    const int column = column0 + i % kColumns;
    if (column >= out_features) continue;
    float total = 0.f;
#pragma unroll
    for (int s = 0; s < Tile::kWarps; ++s) total = __fadd_rn(total, sums[s * of_warp + i]);
    const int64_t token = int64_t{part} * lists.tokens + first + i / kColumns;
    __stcg(launch.sums + token * out_features + column, total);
  }
}

// Adds up what blocks have written: a thread has a column of a token.
struct ActiveSumTile {
  static constexpr int kThreads = 128;
};
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads) add_active_sums_kernel(const ActiveLaunch launch) {
  const int64_t out_features = launch.args.out_features, all = launch.lists.tokens * out_features;
  const int64_t i = int64_t{blockIdx.x} * Tile::kThreads + threadIdx.x;
  wait_for_predecessors();
  if (i >= all) return;
  float sums[kActiveParts], total = 0.f;
#pragma unroll
  for (int p = 0; p < kActiveParts; ++p) sums[p] = __ldcg(launch.sums + p * all + i);
#pragma unroll
  for (int p = 0; p < kActiveParts; ++p) total = __fadd_rn(total, sums[p]);
  const int64_t token = i / out_features;
  const int column = int(i % out_features);
  const MmActiveArgs& args = launch.args;
  if (args.scale_w != nullptr) total = __fmul_rn(total, args.scale_w[args.scale_w_per_column ? column : 0]);
  if (args.bias != nullptr) total = __fadd_rn(total, load_as(args.bias_dtype, args.bias, column));
  store_as(args.out_dtype, args.out, token * out_features + column, total);
}

// Lists of y as it lies in memory: a block makes one, of which each thread has a neuron at once.
struct ActiveListTile {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
};
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads) list_active_kernel(const ActiveLaunch launch) {
  const MmActiveArgs& args = launch.args;
  const ActiveLists& lists = launch.lists;
  __shared__ int counts[2][Tile::kWarps];
  const int warp = threadIdx.x / 32, list = blockIdx.x, slice = list / lists.groups;
  const int first = list % lists.groups * kListTokens;
  const int64_t begin = active_slice(args.features, slice);
  const int rows = int(active_slice(args.features, slice + 1) - begin);
  const auto* y = static_cast<const uint16_t*>(args.y) + first * args.features + begin;
  wait_for_predecessors();
  launch_dependents();
  int count = 0, turn = 0;
  for (int row0 = 0; row0 < rows; row0 += Tile::kThreads, turn ^= 1) {
    const int row = row0 + int(threadIdx.x), tokens = row < rows ? lists.tokens - first : 0;
    const uint4 of_row = eight_tokens(y + row, args.features, tokens);
    const uint32_t all = __ballot_sync(0xffffffffu, is_active(of_row));
    if (threadIdx.x % 32 == 0) counts[turn][warp] = __popc(all);
    __syncthreads();
    int before = 0, of_turn = 0;
#pragma unroll
    for (int w = 0; w < Tile::kWarps; ++w) {
      before += w < warp ? counts[turn][w] : 0;
      of_turn += counts[turn][w];
    }
    append_active(lists, list, count + before, of_row, row);
    count += of_turn;
  }
  if (threadIdx.x == 0) lists.counts[list] = count;
}

}  // namespace sparse24::cuda
