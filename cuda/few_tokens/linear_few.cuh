// The first product for few tokens: y = relu(x @ w.T)^2, which streams w through registers once.
//
// Each of a block's 16 warps multiplies 8 * kRows8 rows of w in one of four slices of K; its lanes load w in the very
// fragments that mma.sync takes, 16 bytes at a time and eight times ahead, and x comes from shared memory. A block has
// consecutive rows, in passes of 32 * kRows8; at the end of a pass the four sums of K are added, in order. Sums depend
// on K alone: not on the number of tokens, nor on the tile.
#pragma once

#include "few_tokens/asynchronous.cuh"
#include "few_tokens/mma.cuh"
#include "few_tokens/weights.cuh"
#include "sparse24/relu2_mlp_few.h"

namespace sparse24::cuda {

// kResident: all of x is in shared memory at once; or 128 columns of each slice, twice.
template <int kTokens_, int kRows8_, bool kResident_>
struct LinearTile {
  static constexpr int kTokens = kTokens_;  // at most: 8, or a multiple of 16
  static constexpr int kRows8 = kRows8_;
  static constexpr bool kResident = kResident_;
  static constexpr int kThreads = 512, kSlices = 4, kGroups = 4;  // of K, of rows
  static constexpr int kMmaTokens = (kTokens + 15) / 16;
  static constexpr int kGroupRows = 8 * kRows8, kPassRows = kGroups * kGroupRows;
  static constexpr int kAhead = 8 / kRows8;  // blocks of K that are under way
  static constexpr int kSumPitch = kPassRows + 8;
};

// How x lies in shared memory for weights of kWeightBytes: a block of K is what four lanes load of a row of w.
template <class Tile, int kWeightBytes>
struct LinearShape {
  static constexpr int kVec = 16 / kWeightBytes, kBlock = 4 * kVec;
  static constexpr int kChunkBlocks = 128 / kBlock;
  // A row of tokens begins this many bytes after a multiple of 128: eight lanes, of two tokens, meet no bank twice.
  static constexpr int kSkew = kWeightBytes == 2 ? 64 : 16;
  static constexpr int kChunkPitch = 2 * 128 + kSkew;
  static constexpr int kStageBytes = Tile::kSlices * Tile::kTokens * kChunkPitch;
  static constexpr int kSumBytes = Tile::kSlices * 16 * Tile::kSumPitch * 4;

  static_assert(Tile::kResident || kChunkBlocks % Tile::kAhead == 0);

  SPARSE24_HD static int64_t blocks(int64_t in) { return ceil_div(in, kBlock); }
  // The first block of a slice.
  SPARSE24_HD static int64_t slice_begin(int64_t in, int slice) { return blocks(in) * slice / Tile::kSlices; }
  SPARSE24_HD static int resident_pitch(int64_t in) {
    const int bytes = int(blocks(in)) * kBlock * 2;
    return round_up(bytes, 128) + kSkew;
  }
  SPARSE24_HD static int64_t shared_bytes(int64_t in) {
    const int64_t x = Tile::kResident ? int64_t{Tile::kTokens} * resident_pitch(in) : int64_t{2} * kStageBytes;
    return x + kSumBytes;
  }
};

// Eight consecutive elements of what a lane has loaded of w, the first eight or the next ones, as pairs of T.
template <class T, class W>
__device__ __forceinline__ void to_pairs(const uint4& v, int half, uint32_t (&pairs)[4]) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(W) == 2) {
      pairs[i] = words[i];
    } else {
      pairs[i] = e4m3x2_to_pair(T{}, uint16_t(words[2 * half + i / 2] >> (i % 2 * 16)));
    }
  }
}

template <class T, class W, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) linear_few_kernel(const LinearFewArgs args) {
  using Shape = LinearShape<Tile, int(sizeof(W))>;
  constexpr int kVec = Shape::kVec, kBlock = Shape::kBlock, kRows8 = Tile::kRows8, kAhead = Tile::kAhead;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t x_at = shared_address(shared);

  if (blockIdx.x == 0) {
    for (int i = threadIdx.x; i < args.zero_count; i += Tile::kThreads) args.zeros[i] = 0;
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = warp / Tile::kSlices, slice = warp % Tile::kSlices, row8 = lane / 4, quad = lane % 4;
  const int tokens = int(args.tokens), in = int(args.in);
  const auto* x = static_cast<const uint16_t*>(args.x);

  // Rows of this block, and of each of its passes and groups.
  const int64_t row0 = args.out * blockIdx.x / gridDim.x, row_end = args.out * (blockIdx.x + 1) / gridDim.x;
  const int rows = int(row_end - row0), passes = (rows + Tile::kPassRows - 1) / Tile::kPassRows;
  const int pass_rows = passes > 0 ? (rows + passes - 1) / passes : 0;
  const int group_rows = (pass_rows + Tile::kGroups - 1) / Tile::kGroups;
  const int block0 = int(Shape::slice_begin(in, slice)), blocks = int(Shape::slice_begin(in, slice + 1)) - block0;
  // The same for all slices: a multiple of what is under way, or of a chunk.
  constexpr int kStep = Tile::kResident ? kAhead : Shape::kChunkBlocks;
  const int most = (int(Shape::blocks(in)) + Tile::kSlices - 1) / Tile::kSlices;
  const int padded = (most + kStep - 1) / kStep * kStep;

  // ---- w: the next loads are those of block `load_block` of pass `load_pass` ----
  uint4 ring[kAhead][kRows8];
  int load_pass = 0, load_block = 0;
  const auto* w = static_cast<const unsigned char*>(args.w);
  const int64_t row_bytes = int64_t{in} * int(sizeof(W));
  int valid = 0;  // of the rows that this lane loads, in this pass
  const unsigned char* from = w;
  const auto enter_pass = [&] {
    const int first = load_pass * pass_rows + group * group_rows + row8;
    const int end = min(min((load_pass + 1) * pass_rows, rows), load_pass * pass_rows + (group + 1) * group_rows);
    valid = load_pass < passes ? max(0, (end - first + 7) / 8) : 0;
    from = w + (row0 + first) * row_bytes + (block0 * kBlock + quad * kVec) * int(sizeof(W));
  };
  const auto load = [&](uint4(&to)[kRows8], int block) {
    const bool exists = block < blocks && (block0 + block) * kBlock + quad * kVec < in;
#pragma unroll
    for (int r = 0; r < kRows8; ++r) {
      to[r] = uint4{0, 0, 0, 0};
      if (exists && r < valid) to[r] = load_once(from + block * (kBlock * int(sizeof(W))) + r * 8 * row_bytes);
    }
  };
  enter_pass();
#pragma unroll
  for (int d = 0; d < kAhead; ++d) load(ring[d], d);
  load_block = kAhead;

  // ---- x ----
  const int pitch = Tile::kResident ? Shape::resident_pitch(in) : Shape::kChunkPitch;
  const int chunks = padded / Shape::kChunkBlocks;
  const auto fetch_x = [&](int chunk, int stage) {
    constexpr int kPieces = 16;  // of 16 bytes, in 128 columns
    for (int i = threadIdx.x; i < Tile::kSlices * tokens * kPieces; i += Tile::kThreads) {
      const int piece = i % kPieces, token = i / kPieces % tokens, s = i / kPieces / tokens;
      const int column = (int(Shape::slice_begin(in, s)) + chunk * Shape::kChunkBlocks) * kBlock + piece * 8;
      const bool exists = column < in;
      copy16_async(x_at + stage * Shape::kStageBytes + (s * Tile::kTokens + token) * pitch + piece * 16,
                   x + int64_t{token} * in + (exists ? column : 0), exists);
    }
    commit_copies();
  };
  if constexpr (Tile::kResident) {
    const int pieces = int(Shape::blocks(in)) * kBlock / 8;
    for (int i = threadIdx.x; i < tokens * pieces; i += Tile::kThreads) {
      const int token = i / pieces, column = i % pieces * 8;
      const bool exists = column < in;
      copy16_async(x_at + token * pitch + column * 2, x + int64_t{token} * in + (exists ? column : 0), exists);
    }
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
  } else {
    fetch_x(0, 0);
  }
  const uint32_t x_lane = x_at + row8 * pitch + quad * kVec * 2 +
                          (Tile::kResident ? uint32_t(block0 * kBlock * 2) : uint32_t(slice * Tile::kTokens * pitch));

  constexpr int kXBytes = Tile::kResident ? 0 : 2 * Shape::kStageBytes;
  auto* sums = reinterpret_cast<float*>(
      shared + (Tile::kResident ? Tile::kTokens * pitch : kXBytes));  // [slices][16 tokens][rows of a pass]
  int stage = 0;

  for (int pass = 0; pass < passes; ++pass) {
    float c[Tile::kMmaTokens][kRows8][4] = {};
    for (int block = 0; block < padded; block += kAhead) {
      uint32_t x_block = x_lane + block * kBlock * 2;
      if constexpr (!Tile::kResident) {
        const int within = block % Shape::kChunkBlocks;
        if (within == 0) {
          if (block > 0 || pass > 0) stage ^= 1;
          wait_for_copies<0>();
          __syncthreads();  // this stage is there, the other one is free
          const int chunk = block / Shape::kChunkBlocks + 1;
          if (chunk < chunks || pass + 1 < passes) fetch_x(chunk < chunks ? chunk : 0, stage ^ 1);
        }
        x_block = x_lane + stage * Shape::kStageBytes + within * kBlock * 2;
      }
      if (load_block == padded) {
        load_block = 0;
        ++load_pass;
        enter_pass();
      }
#pragma unroll
      for (int d = 0; d < kAhead; ++d) {
        if (block + d < blocks) {
#pragma unroll
          for (int half = 0; half < kVec / 8; ++half) {
            uint32_t pairs[kRows8][4];
#pragma unroll
            for (int r = 0; r < kRows8; ++r) to_pairs<T, W>(ring[d][r], half, pairs[r]);
#pragma unroll
            for (int m = 0; m < Tile::kMmaTokens; ++m) {
              const uint32_t at = x_block + d * kBlock * 2 + m * 16 * pitch + half * 16;
              const uint4 low = load_shared4(at);
              const uint4 high = Tile::kTokens > 8 ? load_shared4(at + 8 * pitch) : uint4{0, 0, 0, 0};
              const uint32_t first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
              for (int r = 0; r < kRows8; ++r) {
                multiply(T{}, c[m][r], first, pairs[r][0], pairs[r][1]);
                multiply(T{}, c[m][r], second, pairs[r][2], pairs[r][3]);
              }
            }
          }
        }
        load(ring[d], load_block + d);
      }
      load_block += kAhead;
    }

    // ---- the sums of the four slices, 16 tokens at a time ----
    if (pass + 1 == passes) launch_dependents();
    const int64_t pass0 = row0 + pass * pass_rows;
    const int pass_end = min(pass_rows, rows - pass * pass_rows);
#pragma unroll
    for (int m = 0; m < Tile::kMmaTokens; ++m) {
      __syncthreads();
#pragma unroll
      for (int r = 0; r < kRows8; ++r) {
        float* to = sums + (slice * 16 + row8) * Tile::kSumPitch + group * Tile::kGroupRows + r * 8 + quad * 2;
        *reinterpret_cast<float2*>(to) = {c[m][r][0], c[m][r][1]};
        if constexpr (Tile::kTokens > 8) {
          *reinterpret_cast<float2*>(to + 8 * Tile::kSumPitch) = {c[m][r][2], c[m][r][3]};
        }
      }
      __syncthreads();
      for (int i = threadIdx.x; i < (Tile::kTokens > 8 ? 16 : 8) * Tile::kPassRows; i += Tile::kThreads) {
        const int token = i / Tile::kPassRows, local = i % Tile::kPassRows, in_group = local % Tile::kGroupRows;
        const int row = local / Tile::kGroupRows * group_rows + in_group;
        if (16 * m + token >= tokens || in_group >= group_rows || row >= pass_end) continue;
        float sum = 0.f;
#pragma unroll
        for (int s = 0; s < Tile::kSlices; ++s) sum += sums[(s * 16 + token) * Tile::kSumPitch + local];
        const int64_t f = pass0 + row;
        if (args.scale_w != nullptr) sum = __fmul_rn(sum, args.scale_w[args.scale_w_per_row ? f : 0]);
        if (args.bias != nullptr) sum = __fadd_rn(sum, to_float(T{}, static_cast<const uint16_t*>(args.bias)[f]));
        const float h = to_float(T{}, uint16_t(pack2(T{}, sum, 0.f)));
        const float kept = h <= args.threshold ? 0.f : h;  // NaN is kept
        static_cast<uint16_t*>(args.y)[int64_t{16 * m + token} * args.out + f] =
            uint16_t(pack2(T{}, __fmul_rn(kept, kept), 0.f));
      }
    }
    __syncthreads();
  }
}

}  // namespace sparse24::cuda
