// The first product for few tokens: y = relu(x @ w.T)^2, which streams w through shared memory once.
//
// Each warp of a block multiplies 16 rows of w in one of four slices of K: it copies them into a ring of its own,
// several chunks ahead, and takes them from there in the very fragments that mma.sync takes, 16 bytes a lane. A block
// has consecutive rows, in passes; at the end of a pass the four sums of K are added, in order. Sums depend on K
// alone: not on the number of tokens, nor on the tile.
#pragma once

#include "few_tokens/active_lists.cuh"
#include "few_tokens/linear_few.h"
#include "few_tokens/linear_tile.cuh"

namespace sparse24::cuda {

// The A fragment of 16 rows and the i-th 16 columns of 64 bytes of K, from what lanes have loaded of rows g and g + 8;
// float8 weights as P.
template <class P, class W>
__device__ __forceinline__ void to_fragment(const uint4& row, const uint4& row8, int i, uint32_t (&a)[4]) {
  const uint32_t low[4] = {row.x, row.y, row.z, row.w}, high[4] = {row8.x, row8.y, row8.z, row8.w};
  if constexpr (sizeof(W) == 2) {
    a[0] = low[2 * i];
    a[1] = high[2 * i];
    a[2] = low[2 * i + 1];
    a[3] = high[2 * i + 1];
  } else {
    a[0] = e4m3x2_to_pair(P{}, uint16_t(low[i]));
    a[1] = e4m3x2_to_pair(P{}, uint16_t(high[i]));
    a[2] = e4m3x2_to_pair(P{}, uint16_t(low[i] >> 16));
    a[3] = e4m3x2_to_pair(P{}, uint16_t(high[i] >> 16));
  }
}

// The rows of a block of linear_few: a slice of the neurons, in passes of about as many.
template <class Tile>
__device__ __forceinline__ LinearRows rows_of_slice(int64_t out, int slice) {
  const int64_t first = active_slice(out, slice);
  const int rows = int(active_slice(out, slice + 1) - first);
  const int passes = (rows + Tile::kPassRows - 1) / Tile::kPassRows,
            of_pass = passes > 0 ? (rows + passes - 1) / passes : 0;
  return {first, passes, of_pass, rows};
}

// Multiplies rows of w with all tokens, and gives each y to the sink.
//
// The sink has: `store(token, row, y)`, where `row` counts from the first one of the pass; `begin_end(pass)` before,
// and `end(pass, rows)` behind, the stores of a pass.
template <class T, class W, class Tile, class Sink>
__device__ __forceinline__ void multiply_rows(const LinearFewArgs& args, const LinearRows& rows, unsigned char* shared,
                                              const Sink& sink) {
  using Shape = LinearShape<Tile, int(sizeof(W))>;
  constexpr int kEights = Tile::kEights, kVec = Shape::kVec, kBlock = Shape::kBlock;
  constexpr int kProducts = 4 / int(sizeof(W)), kRowTiles = Tile::kRowTiles;  // of a block, of a warp
  using P = std::conditional_t<Tile::kUsed, T, ProductOf<T, W>>;
  const uint32_t shared_at = shared_address(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
  const int group = warp / Tile::kSlices, slice = warp % Tile::kSlices;
  const int tokens = int(args.tokens), in = int(args.in);
  static_assert(Tile::kThreads % Tile::kPassRows == 0);

  // Rows of each group of a pass; blocks of K of this warp.
  const int group_rows = (rows.of_pass + Tile::kGroups - 1) / Tile::kGroups;
  const int block0 = Shape::slice_begin(in, slice), blocks = Shape::slice_begin(in, slice + 1) - block0;
  const int most_blocks = (Shape::blocks(in) + Tile::kSlices - 1) / Tile::kSlices;  // of a slice
  const int chunks = (most_blocks + Tile::kChunkBlocks - 1) / Tile::kChunkBlocks;   // the same for all slices

  const int64_t row_bytes = int64_t{in} * int(sizeof(W));
  WeightRing<Tile> ring{static_cast<const unsigned char*>(args.w) + rows.first * row_bytes +
                            block0 * Tile::kBlockBytes + lane % WeightRing<Tile>::kLanes * 16,
                        row_bytes,
                        min(blocks * Tile::kBlockBytes, int(row_bytes) - block0 * Tile::kBlockBytes),
                        chunks,
                        rows,
                        group_rows,
                        group,
                        shared_at + warp * Tile::kStages * Tile::kStageBytes,
                        lane,
                        read_once_policy()};
  // x is asked for first: behind the weights in the ring it would arrive when these are all there.
  auto* sums = reinterpret_cast<float*>(shared + Tile::kRingBytes);  // [slices][tokens][rows of a pass]
  constexpr int kScalesAt = Tile::kRingBytes + Tile::kSumBytes + Tile::kYBytes + Tile::kCountBytes;
  auto* scales = reinterpret_cast<float*>(shared + kScalesAt);
  using Tokens = StagedTokens<T, W, Tile>;
  constexpr bool kScales = Tokens::kScales;
  const Tokens x{static_cast<const uint16_t*>(args.x),  tokens, in, shared + Shape::x_at(in), scales,
                 shared + kScalesAt + Tile::kScaleBytes};
  const auto copy = [&] {
    if constexpr (Shape::kRing) {
      if (!ring.complete()) x.copy_chunk(block0 * kBlock, ring.chunk, ring.stage);
    }
    if (ring.complete()) {
      commit_copies();
    } else {
      ring.copy();
    }
    ring.advance();
  };
  constexpr bool kTwice = !Tile::kResident && !Shape::kRing;
  typename Tokens::Batch first_x;
  typename Tokens::Pieces next_x;
  if (Tile::kResident || kScales) x.load_batch(x.first_place(), first_x);
  if constexpr (kTwice) x.load_chunk(0, next_x);
#pragma unroll
  for (int s = 0; s < (Shape::kRing ? Tile::kStages - 1 : Tile::kStages); ++s) copy();
  x.find_scales(first_x, reinterpret_cast<uint32_t*>(sums));
  if constexpr (Tile::kResident) {
    x.store_all(first_x);
  } else if constexpr (kTwice) {
    x.store_chunk(0, 0, next_x);
  }
  __syncthreads();
  const int pitch = Tile::kResident ? Shape::resident_pitch(in) : Shape::kChunkPitch;
  const uint32_t x_lane =
      shared_at + Shape::x_at(in) + (Tile::kResident ? block0 * kBlock * 2 : slice * Tile::kTokens * pitch);

  int stage = 0, x_stage = 0;
  for (int pass = 0; pass < rows.passes; ++pass) {
    const int pass0 = pass * rows.of_pass, pass_end = min(rows.of_pass, rows.end - pass0);
    // What this thread scales and adds at the end of the pass, so that nobody waits for it then.
    const int local = threadIdx.x % Tile::kPassRows, in_group = local % Tile::kWarpRows;
    const int row = local / Tile::kWarpRows * group_rows + in_group;
    const bool row_exists = in_group < group_rows && row < pass_end;
    const int64_t f = rows.first + pass0 + row;
    float scale_w = 1.f;
    uint16_t bias = 0;
    if (row_exists && args.scale_w != nullptr) scale_w = args.scale_w[args.scale_w_per_row ? f : 0];
    if (row_exists && args.bias != nullptr) bias = static_cast<const uint16_t*>(args.bias)[f];

    float c[kRowTiles][kEights][4] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const bool more_x = kTwice && (chunk + 1 < chunks || pass + 1 < rows.passes);
      const int next_chunk = chunk + 1 < chunks ? chunk + 1 : 0;
      if constexpr (kTwice) {
        if (more_x) x.load_chunk(next_chunk, next_x);
      }
      if constexpr (Shape::kRing) {
        // All warps of the slice have this chunk of x then, and are done with the one whose place the next copy takes.
        wait_for_copies<Tile::kStages - 2>();
        wait_at_barrier<Tokens::kSliceThreads>(slice + 1);
        copy();
      } else {
        wait_for_copies<Tile::kStages - 1>();
        __syncwarp();
      }
      const uint32_t w_stage = ring.ring + stage * Tile::kStageBytes;
      const int left = blocks - chunk * Tile::kChunkBlocks;
      const uint32_t x_chunk = x_lane + (Tile::kResident ? chunk * Shape::kChunkColumns * 2
                                                         : (Shape::kRing ? stage : x_stage) * Shape::kXStageBytes);
#pragma unroll
      for (int b = 0; b < Tile::kChunkBlocks; ++b) {
        if (b >= left) continue;
        const int block = block0 + chunk * Tile::kChunkBlocks + b, byte = b * Tile::kBlockBytes + q * 16;
        uint4 row[kRowTiles], row8[kRowTiles];
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          row[r] = load_shared4(w_stage + ring.at(16 * r + g, byte));
          row8[r] = load_shared4(w_stage + ring.at(16 * r + g + 8, byte));
          if (block * kBlock + q * kVec >= in) row[r] = row8[r] = uint4{0, 0, 0, 0};
        }
        uint32_t a[kRowTiles][kProducts][4];
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
          for (int i = 0; i < kProducts; ++i) to_fragment<P, W>(row[r], row8[r], i, a[r][i]);
        }
#pragma unroll
        for (int e = 0; e < kEights; ++e) {
          uint32_t factors[2 * kProducts] = {};
          const int token = 8 * e + g;
          if (token < tokens) {
#pragma unroll
            for (int i = 0; i < kProducts; i += 2) {
              const int of_x = q * kVec * 2 + b * kBlock * 2 + i * 8;
              const uint4 v = load_shared4(x_chunk + token * pitch + Shape::exchanged(g, of_x));
              factors[2 * i] = v.x;
              factors[2 * i + 1] = v.y;
              factors[2 * i + 2] = v.z;
              factors[2 * i + 3] = v.w;
            }
          }
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
            for (int i = 0; i < kProducts; ++i) multiply(P{}, c[r][e], a[r][i], factors[2 * i], factors[2 * i + 1]);
          }
          if constexpr (kScales) {
            static_assert(kRowTiles == 1);
            if (x.rests[block] == 0) continue;
            const int column = block * kBlock + q * kVec;
            const float scale = token < tokens ? scales[token] : 0.f;
#pragma unroll
            for (int i = 0; i < kProducts; i += 2) {
              const uint4 v = token < tokens ? x.load(token, column + 4 * i) : uint4{0, 0, 0, 0};
              add_rests(c[0][e], a[0][i], v.x, v.y, scale);
              add_rests(c[0][e], a[0][i + 1], v.z, v.w, scale);
            }
          }
        }
      }
      if constexpr (!Shape::kRing) {
        __syncwarp();
        copy();
      }
      stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
      if constexpr (kTwice) {
        x_stage ^= 1;
        if (more_x) x.store_chunk(next_chunk, x_stage, next_x);
        __syncthreads();
      }
    }

    // ---- the sums of the four slices, some tokens at a time ----
    sink.begin_end(pass);
#pragma unroll
    for (int first = 0; first < Tile::kTokens; first += Tile::kSumTokens) {
#pragma unroll
      for (int e = 0; e < Tile::kSumTokens / 8; ++e) {
#pragma unroll
        for (int i = 0; i < 4 * kRowTiles; ++i) {
          const int token = 8 * e + 2 * q + i % 2, at = group * Tile::kWarpRows + g + i / 2 * 8;
          sums[(slice * Tile::kSumTokens + token) * Tile::kSumPitch + at] = c[i / 4][first / 8 + e][i % 4];
        }
      }
      __syncthreads();
      for (int i = threadIdx.x; i < Tile::kSumTokens * Tile::kPassRows; i += Tile::kThreads) {
        const int token = i / Tile::kPassRows;
        if (first + token >= tokens || !row_exists) continue;
        float sum = 0.f;
#pragma unroll
        for (int s = 0; s < Tile::kSlices; ++s) {
          sum += sums[(s * Tile::kSumTokens + token) * Tile::kSumPitch + local];
        }
        if constexpr (kScales) sum = __fmul_rn(sum, scales[Tile::kTokens + first + token]);
        if (args.scale_w != nullptr) sum = __fmul_rn(sum, scale_w);
        if (args.bias != nullptr) sum = __fadd_rn(sum, to_float(T{}, bias));
        const float h = to_float(T{}, uint16_t(pack2(T{}, sum, 0.f)));
        const float kept = h <= args.threshold ? 0.f : h;  // NaN is kept
        sink.store(first + token, pass0, row, uint16_t(pack2(T{}, __fmul_rn(kept, kept), 0.f)));
      }
      __syncthreads();
    }
    sink.end(pass, pass_end);
  }
}

// Makes lists of what is active.
template <class Tile>
struct ActiveSink {
  const LinearLaunch& launch;
  LinearRows rows;
  uint16_t* y;  // [tokens][kPassRows] in shared memory
  int* counts;  // [groups] there

  __device__ __forceinline__ void begin_end(int pass) const {
    if (pass + 1 == rows.passes) launch_dependents();
  }
  __device__ __forceinline__ void store(int token, int, int row, uint16_t value) const {
    y[token * Tile::kPassRows + row] = value;
  }
  __device__ __forceinline__ void end(int pass, int pass_rows) const {
    const ActiveLists& lists = launch.lists;
    const int lane = threadIdx.x % 32, pass0 = pass * rows.of_pass;
    for (int group = threadIdx.x / 32; group < lists.groups; group += Tile::kWarps) {
      const int list = blockIdx.x * lists.groups + group, first = group * kListTokens;
      int count = pass == 0 ? 0 : counts[group];
#pragma unroll
      for (int row0 = 0; row0 < Tile::kPassRows; row0 += 32) {
        const int row = row0 + lane, tokens = row < pass_rows ? lists.tokens - first : 0;
        const uint4 of_row = eight_tokens(y + first * Tile::kPassRows + row, Tile::kPassRows, tokens);
        count = append_active(lists, list, count, of_row, pass0 + row);
      }
      if (lane == 0) counts[group] = count;
      if (lane == 0 && pass + 1 == rows.passes) lists.counts[list] = count;
      __syncwarp();
    }
  }
};

template <class T, class W, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) linear_few_kernel(const LinearLaunch launch) {
  extern __shared__ __align__(16) unsigned char shared[];
  const ActiveLists& lists = launch.lists;
  const LinearRows rows = rows_of_slice<Tile>(launch.args.out, blockIdx.x);
  auto* y = reinterpret_cast<uint16_t*>(shared + Tile::kRingBytes + Tile::kSumBytes);
  const ActiveSink<Tile> sink{launch, rows, y,
                              reinterpret_cast<int*>(shared + Tile::kRingBytes + Tile::kSumBytes + Tile::kYBytes)};
  wait_for_predecessors();
  if (rows.passes == 0) {
    for (int g = threadIdx.x; g < lists.groups; g += Tile::kThreads) lists.counts[blockIdx.x * lists.groups + g] = 0;
    return;
  }
  multiply_rows<T, W, Tile>(launch.args, rows, shared, sink);
}

}  // namespace sparse24::cuda
