// The kernels of mm_active: each token's rows of w, as lists name them.
//
// A warp has 256 columns and a slice of the neurons, a block sixteen slices, and a kernel behind adds up what blocks
// have written. The whole warp does the same: eight columns a lane, whose sums are a chain of multiply-adds for each
// token. Tokens take a slice one behind the other, so that a row which several use comes from memory once.
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

struct ActiveTile {
  static constexpr int kWarps = int(kActivePart), kThreads = 32 * kWarps;
  static constexpr int kOfLane = 8, kColumns = 32 * kOfLane;
  static constexpr int kParts = int(kActiveSlices) / kWarps;  // of the neurons, each of a block
  static constexpr int kTokens = 8;                           // at once
  static constexpr int kRows = 4, kStages = 3;  // of a list that are loaded at once, and such loads under way
  static constexpr int64_t shared_bytes(int64_t tokens) {
    return (tokens < kTokens ? tokens : kTokens) * kWarps * kColumns * 4;
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

// Some entries of a list, and a lane's columns of the rows that they name.
template <class Y, class W, bool kVectors>
struct ActiveRows {
  enum class State { kEmpty, kSome, kLast };         // kLast: those that end the list
  static constexpr int kWords = 2 * int(sizeof(W));  // of eight columns
  float y[ActiveTile::kRows] = {};                   // zero where there is no row
  uint32_t words[ActiveTile::kRows][kWords] = {};
  State state = State::kEmpty;

  __device__ __forceinline__ void load(const uint4& entries, int count, const char* w, uint32_t row_bytes,
                                       int columns) {
    const uint32_t e[4] = {entries.x, entries.y, entries.z, entries.w};
#pragma unroll
    for (int i = 0; i < ActiveTile::kRows; ++i) {
      const bool exists = i < count;
      y[i] = exists ? to_float(Y{}, uint16_t(e[i] >> 16)) : 0.f;
      const char* from = w + uint64_t{row_bytes} * (e[i] & 0xffffu);
      if constexpr (kVectors) {
        load_if(exists, from, words[i]);
      } else {
#pragma unroll
        for (int j = 0; j < kWords; ++j) words[i][j] = 0;
#pragma unroll
        for (int c = 0; c < ActiveTile::kOfLane; ++c) {
          if (!exists || c >= columns) continue;
          const uint32_t element =
              sizeof(W) == 2 ? reinterpret_cast<const uint16_t*>(from)[c] : reinterpret_cast<const uint8_t*>(from)[c];
          words[i][c * int(sizeof(W)) / 4] |= element << c * int(sizeof(W)) % 4 * 8;
        }
      }
    }
  }
  __device__ __forceinline__ void add(float (&c)[ActiveTile::kOfLane]) const {
#pragma unroll
    for (int i = 0; i < ActiveTile::kRows; ++i) {
      float of_column[ActiveTile::kOfLane];
      widen<W>(words[i], of_column);
      multiply_add_if(y[i], of_column, c);
    }
  }
};

// Goes through the lists of a slice, token by token, some entries at a time. What is not a lane's own is the same in
// all.
struct ActiveCursor {
  const ActiveLaunch& launch;
  int slice, token, end;  // the next token to be opened, and that behind the last one
  const char* w;          // this lane's columns of the slice's first row
  uint32_t row_bytes;
  int columns;  // from this lane's first one on

  struct List {
    int count;
    const uint32_t* entries;
  };
  List now{}, next{};
  uint4 entries{}, further{};                // this lane's of the next steps of the list, and of those behind them
  int loaded = 0, to_load = 0, in_warp = 0;  // steps of the list, and of the entries

  __device__ __forceinline__ List open() {
    const ActiveLists& lists = launch.lists;
    if (token >= end) return {0, lists.entries};
    const int index = slice * lists.tokens + token++;
    return {__ldcg(lists.counts + index), lists.entries + int64_t{index} * lists.capacity};
  }
  // The entries of as many steps as there are lanes, from one step on: one step's for each lane.
  __device__ __forceinline__ uint4 fetch(const List& list, int from) const {
    const int first = (from + int(threadIdx.x % 32)) * ActiveTile::kRows;
    if (first >= launch.lists.capacity) return {0, 0, 0, 0};
    return __ldcg(reinterpret_cast<const uint4*>(list.entries + first));
  }
  // Behind those that were fetched last.
  __device__ __forceinline__ void fetch_further() {
    further = loaded + 32 < to_load ? fetch(now, loaded + 32) : fetch(next, 0);
  }
  __device__ __forceinline__ void enter() {
    const unsigned count = __reduce_max_sync(0xffffffffu, unsigned(now.count));  // for a uniform register
    to_load = max(1, int(count + ActiveTile::kRows - 1) / ActiveTile::kRows);
    loaded = in_warp = 0;
    next = open();
    fetch_further();
  }
  __device__ __forceinline__ void begin() {
    now = open();
    entries = fetch(now, 0);  // while the count is on its way
    enter();
  }
  template <class Rows>
  __device__ __forceinline__ void load(Rows& rows) {
    const auto of_step = [&](uint32_t v) { return __shfl_sync(0xffffffffu, v, in_warp); };
    const uint4 four{of_step(entries.x), of_step(entries.y), of_step(entries.z), of_step(entries.w)};
    rows.load(four, columns > 0 ? now.count - loaded * ActiveTile::kRows : 0, w, row_bytes, columns);
    const bool last = ++loaded == to_load;
    rows.state = last ? Rows::State::kLast : Rows::State::kSome;
    if (last) {
      now = next;
      entries = further;
      enter();
    } else if (++in_warp == 32) {
      in_warp = 0;
      entries = further;
      fetch_further();
    }
  }
};

template <class Y, class W, bool kVectors>
__global__ void __launch_bounds__(ActiveTile::kThreads, 1) mm_active_kernel(const ActiveLaunch launch) {
  using Rows = ActiveRows<Y, W, kVectors>;
  constexpr int kColumns = ActiveTile::kColumns;
  const MmActiveArgs& args = launch.args;
  extern __shared__ __align__(16) unsigned char shared[];
  auto* sums = reinterpret_cast<float*>(shared);  // [warps][tokens at once][kColumns]
  const int warp = threadIdx.x / 32, in_block = threadIdx.x % 32 * ActiveTile::kOfLane;
  const int part = blockIdx.x % ActiveTile::kParts, slice = part * ActiveTile::kWarps + warp;
  const int column0 = blockIdx.x / ActiveTile::kParts * kColumns, out_features = int(args.out_features);
  const uint32_t row_bytes = uint32_t(out_features * int(sizeof(W)));
  const char* w = static_cast<const char*>(args.w) + active_slice(args.features, slice) * row_bytes +
                  int64_t{column0 + in_block} * int(sizeof(W));
  wait_for_predecessors();

  for (int first = 0; first < launch.lists.tokens; first += ActiveTile::kTokens) {
    const int tokens = min(launch.lists.tokens - first, ActiveTile::kTokens), of_warp = tokens * kColumns;
    ActiveCursor cursor{launch, slice, first, first + tokens, w, row_bytes, out_features - column0 - in_block};
    cursor.begin();
    Rows rows[ActiveTile::kStages];
    float c[ActiveTile::kOfLane] = {};
    for (int token = 0; token < tokens;) {
#pragma unroll
      for (int s = 0; s < ActiveTile::kStages; ++s) {
        const auto state = rows[s].state;
        if (state != Rows::State::kEmpty) rows[s].add(c);
        cursor.load(rows[s]);
        if (state != Rows::State::kLast) continue;
        auto* to = reinterpret_cast<float4*>(sums + warp * of_warp + token * kColumns + in_block);
        to[0] = {c[0], c[1], c[2], c[3]};
        to[1] = {c[4], c[5], c[6], c[7]};
#pragma unroll
        for (int v = 0; v < ActiveTile::kOfLane; ++v) c[v] = 0.f;
        if (++token == tokens) break;
      }
    }

    if (first + tokens == launch.lists.tokens) launch_dependents();
    __syncthreads();
    for (int i = threadIdx.x; i < of_warp; i += ActiveTile::kThreads) {
      const int column = column0 + i % kColumns;
      if (column >= out_features) continue;
      float total = 0.f;
#pragma unroll
      for (int s = 0; s < ActiveTile::kWarps; ++s) total = __fadd_rn(total, sums[s * of_warp + i]);
      const int64_t token = int64_t{part} * launch.lists.tokens + first + i / kColumns;
      __stcg(launch.sums + token * out_features + column, total);
    }
    __syncthreads();
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
  float sums[ActiveTile::kParts], total = 0.f;
#pragma unroll
  for (int p = 0; p < ActiveTile::kParts; ++p) sums[p] = __ldcg(launch.sums + p * all + i);
#pragma unroll
  for (int p = 0; p < ActiveTile::kParts; ++p) total = __fadd_rn(total, sums[p]);
  const int64_t token = i / out_features;
  const int column = int(i % out_features);
  const MmActiveArgs& args = launch.args;
  if (args.scale_w != nullptr) total = __fmul_rn(total, args.scale_w[args.scale_w_per_column ? column : 0]);
  if (args.bias != nullptr) total = __fadd_rn(total, load_as(args.bias_dtype, args.bias, column));
  store_as(args.out_dtype, args.out, token * out_features + column, total);
}

// Lists of y as it lies in memory: each warp makes one.
struct ActiveListTile {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
};
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads) list_active_kernel(const ActiveLaunch launch) {
  const MmActiveArgs& args = launch.args;
  const int index = blockIdx.x * Tile::kWarps + threadIdx.x / 32, slice = index / launch.lists.tokens;
  const int token = index % launch.lists.tokens;
  wait_for_predecessors();
  launch_dependents();
  if (slice >= int(kActiveSlices)) return;
  const int64_t begin = active_slice(args.features, slice), end = active_slice(args.features, slice + 1);
  const int count =
      append_active(launch.lists.entries + int64_t{index} * launch.lists.capacity, 0,
                    static_cast<const uint16_t*>(args.y) + token * args.features + begin, int(end - begin), 0);
  if (threadIdx.x % 32 == 0) launch.lists.counts[index] = count;
}

}  // namespace sparse24::cuda
