// The shape of a block of linear_few, and how its operands lie in shared memory.
#pragma once

#include "few_tokens/asynchronous.cuh"
#include "few_tokens/halves.cuh"
#include "sparse24/relu2_mlp_few.h"

namespace sparse24::cuda {

// kEights: of tokens. kChunk: bytes of a row of w that are copied at once. kStages: such chunks that are on the way.
// kResident: all of x is in shared memory at once; or the columns of a chunk for each slice, with those of w in the
// ring; with float8 weights twice, unless these are widened to x's type. kUsed: they are so, and y goes to memory,
// which is for more than eight tokens. kWarpRows: of w that a warp multiplies.
template <int kEights_, int kChunk_, int kStages_, bool kResident_, bool kUsed_ = false, int kWarpRows_ = 16,
          int kWarps_ = 16>
struct LinearTile {
  static constexpr int kEights = kEights_, kTokens = 8 * kEights, kChunk = kChunk_, kStages = kStages_;
  static constexpr bool kResident = kResident_, kUsed = kUsed_;
  static constexpr int kWarps = kWarps_, kThreads = 32 * kWarps;
  static constexpr int kSlices = 4, kGroups = kWarps / kSlices;  // of K, of rows
  static constexpr int kWarpRows = kWarpRows_, kRowTiles = kWarpRows / 16, kPassRows = kGroups * kWarpRows;
  static constexpr int kStageBytes = kWarpRows * kChunk, kRingBytes = kWarps * kStages * kStageBytes;
  static constexpr int kBlockBytes = 64;  // of a row: what four lanes load at once
  static constexpr int kChunkBlocks = kChunk / kBlockBytes;
  static constexpr int kSumPitch = kPassRows + 4;
  static constexpr int kSumTokens = kEights == 1 || kRowTiles > 1 ? 8 : 16;  // that are added at once
  static constexpr int kSumBytes = kSlices * kSumTokens * kSumPitch * 4;
  static constexpr int kScaleBytes = 2 * kTokens * 4;
  static constexpr int kYBytes = kUsed ? kPassRows : kTokens * kPassRows * 2, kCountBytes = kTokens * 4;
};

// Sizes that depend on the bytes of a weight too.
template <class Tile, int kWeightBytes>
struct LinearShape {
  static constexpr bool kRing = !Tile::kResident && (kWeightBytes == 2 || Tile::kUsed);  // x comes with w
  static constexpr int kVec = 16 / kWeightBytes, kBlock = 4 * kVec;  // elements of a lane, of a block
  static constexpr int kChunkColumns = Tile::kChunkBlocks * kBlock;
  // A row of tokens begins this many bytes after a multiple of 128: eight lanes, of two tokens, meet no bank twice.
  static constexpr int kSkew = kWeightBytes == 2 ? 64 : 16;
  static constexpr int kChunkPitch = 2 * kChunkColumns + (kRing ? 0 : kSkew);
  static constexpr int kXStageBytes = Tile::kSlices * Tile::kTokens * kChunkPitch;
  static constexpr int kXStages = kRing ? Tile::kStages : 2;
  // In the ring pieces of odd tokens are exchanged instead, unless two tokens have 128 bytes.
  static constexpr bool kExchanged = kRing && kChunkPitch > 64;
  SPARSE24_HD static int exchanged(int token, int byte) { return kExchanged ? byte ^ token % 2 * kSkew : byte; }

  SPARSE24_HD static int blocks(int64_t in) { return int(ceil_div(in, kBlock)); }
  // The first block of a slice.
  SPARSE24_HD static int slice_begin(int64_t in, int slice) { return blocks(in) * slice / Tile::kSlices; }
  SPARSE24_HD static int resident_pitch(int64_t in) { return int(round_up(blocks(in) * kBlock * 2, 128)) + kSkew; }
  SPARSE24_HD static int rest_bytes(int64_t in) { return kWeightBytes == 1 ? int(round_up(blocks(in), 16)) : 0; }
  // x comes last.
  SPARSE24_HD static int x_at(int64_t in) {
    return Tile::kRingBytes + Tile::kSumBytes + Tile::kYBytes + Tile::kCountBytes + Tile::kScaleBytes + rest_bytes(in);
  }
  SPARSE24_HD static int64_t shared_bytes(int64_t in, int64_t tokens) {
    return x_at(in) + (Tile::kResident ? tokens * resident_pitch(in) : int64_t{kXStages} * kXStageBytes);
  }
};

// The rows of w of a block, in passes.
struct LinearRows {
  int64_t first;
  int passes, of_pass, end;  // `end` counts from `first`
};

// The chunks of w that a warp multiplies, in a ring in shared memory: 16 rows of a slice of K, pass after pass.
template <class Tile>
struct WeightRing {
  const unsigned char* w;  // of the block's first row, the slice's first column, and this lane's piece
  int64_t row_bytes;
  int slice_bytes, chunks;  // of the slice
  LinearRows rows;
  int group_rows, group;
  uint32_t ring;  // of the warp
  int lane;
  uint64_t policy;
  int pass = 0, chunk = 0, stage = 0;  // of the next copy

  static constexpr int kLanes = Tile::kChunk / 16, kRowsOfCopy = 32 / kLanes;

  // The pieces of odd rows are exchanged by fours, so that eight lanes meet no bank twice; two rows of 64 bytes don't.
  __device__ __forceinline__ static uint32_t at(int row, int byte) {
    return row * Tile::kChunk + (Tile::kChunk > 64 ? byte ^ row % 2 * 64 : byte);
  }

  __device__ __forceinline__ bool complete() const { return pass >= rows.passes || chunks == 0; }
  __device__ __forceinline__ void copy() {
    const int first = pass * rows.of_pass + group * group_rows;
    const int end = min(min((pass + 1) * rows.of_pass, rows.end), first + group_rows);
    const int piece = lane % kLanes * 16, row0 = lane / kLanes;
    const bool exists = chunk * Tile::kChunk + piece < slice_bytes;
    const unsigned char* from = w + (first + row0) * row_bytes + chunk * Tile::kChunk;
    const uint32_t to = ring + stage * Tile::kStageBytes;
#pragma unroll
    for (int i = 0; i < Tile::kWarpRows; i += kRowsOfCopy) {
      copy16_if(exists && first + row0 + i < end, to + at(row0 + i, piece), from + i * row_bytes, policy);
    }
    commit_copies();
    if (++chunk == chunks) {
      chunk = 0;
      ++pass;
    }
  }
  __device__ __forceinline__ void advance() { stage = stage + 1 == Tile::kStages ? 0 : stage + 1; }
};

// x as it is multiplied: of the products' type, in shared memory.
template <class T, class W, class Tile>
struct StagedTokens {
  using Shape = LinearShape<Tile, int(sizeof(W))>;
  static constexpr bool kScales = kScaled<T, W> && !Tile::kUsed;
  const uint16_t* x;
  int tokens, in;
  unsigned char* shared;
  float* scales;         // [tokens], and their reciprocals behind them
  unsigned char* rests;  // of a block of K: whether there are any

  // Eight columns, or zeros.
  __device__ __forceinline__ uint4 load(int token, int column) const {
    if (column >= in) return {0, 0, 0, 0};
    return *reinterpret_cast<const uint4*>(x + int64_t{token} * in + column);
  }
  __device__ __forceinline__ void store(int at, int token, int column, uint4 v) const {
    uint32_t words[4] = {v.x, v.y, v.z, v.w};
    if constexpr (kScales) {
      bool more = false;
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = halves_of(words[i], scales[token], 0, more);
      if (more) rests[column / Shape::kBlock] = 1;
    }
    *reinterpret_cast<uint4*>(shared + at) = {words[0], words[1], words[2], words[3]};
  }

  // All of x, eight columns at a time, in batches whose loads do not wait for each other.
  static constexpr int kBatch = 8;
  struct Place {
    int token, piece;
  };
  using Batch = uint4[kBatch];
  template <class F>
  __device__ __forceinline__ void visit(Place& place, F f) const {
    const int of_token = max(1, Shape::blocks(in) * Shape::kBlock / 8);
    const int tokens_further = Tile::kThreads / of_token, pieces_further = Tile::kThreads % of_token;
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      f(b, place.token, place.piece);
      place.token += tokens_further;
      place.piece += pieces_further;
      if (place.piece >= of_token) {
        place.piece -= of_token;
        ++place.token;
      }
    }
  }
  __device__ __forceinline__ Place first_place() const {
    const int of_token = max(1, Shape::blocks(in) * Shape::kBlock / 8);
    return {int(threadIdx.x) / of_token, int(threadIdx.x) % of_token};
  }
  __device__ __forceinline__ void load_batch(Place place, Batch& v) const {
    visit(place,
          [&](int b, int token, int piece) { v[b] = token < tokens ? load(token, piece * 8) : uint4{0, 0, 0, 0}; });
  }
  // `v`: the first batch. `room`: a word for each token.
  __device__ __forceinline__ void find_scales(const Batch& v, uint32_t* room) const {
    if constexpr (kScales) {
      for (int i = threadIdx.x; i < Shape::blocks(in); i += Tile::kThreads) rests[i] = 0;
      for (int token = threadIdx.x; token < tokens; token += Tile::kThreads) room[token] = 0;
      __syncthreads();
      const auto add = [&](int token, const uint4& piece) {
        uint32_t most = token < tokens ? most_of(most_of(most_of(most_of(0, piece.x), piece.y), piece.z), piece.w) : 0;
        const bool together = __all_sync(0xffffffffu, token == __shfl_sync(0xffffffffu, token, 0));
        if (together) most = __reduce_max_sync(0xffffffffu, most);
        if (token < tokens && (!together || threadIdx.x % 32 == 0)) atomicMax(room + token, most);
      };
      Place place = first_place();
      visit(place, [&](int b, int token, int) { add(token, v[b]); });
      while (__any_sync(0xffffffffu, place.token < tokens)) {
        Batch more;
        load_batch(place, more);
        visit(place, [&](int b, int token, int) { add(token, more[b]); });
      }
      __syncthreads();
      for (int token = threadIdx.x; token < tokens; token += Tile::kThreads) {
        scales[token] = scale_of(room[token]);
        scales[Tile::kTokens + token] = unscale_of(room[token]);
      }
      __syncthreads();
    }
  }
  __device__ __forceinline__ void store_all(Batch& v) const {
    const int pitch = Shape::resident_pitch(in);
    for (Place place = first_place();; load_batch(place, v)) {
      visit(place, [&](int b, int token, int piece) {
        if (token < tokens) store(token * pitch + piece * 16, token, piece * 8, v[b]);
      });
      if (place.token >= tokens) break;
    }
  }
  // A chunk of each slice: loaded before, and stored after, the products of the one in front of it.
  static constexpr int kPieces = Shape::kChunkColumns / 8;
  static constexpr int kOfThread = (Tile::kSlices * Tile::kTokens * kPieces + Tile::kThreads - 1) / Tile::kThreads;
  struct ChunkPlace {
    int slice, token, piece, column;
  };
  __device__ __forceinline__ ChunkPlace place(int i, int chunk) const {
    const int index = threadIdx.x + i * Tile::kThreads, token = index / kPieces % Tile::kTokens;
    const int slice = index / kPieces / Tile::kTokens, piece = index % kPieces;
    const int column = Shape::slice_begin(in, slice) * Shape::kBlock + chunk * Shape::kChunkColumns + piece * 8;
    return {slice, token, piece, column};
  }
  // A chunk of a slice, by asynchronous copies of its warps: `first` is its first column.
  static constexpr int kSliceThreads = Tile::kThreads / Tile::kSlices;
  __device__ __forceinline__ void copy_chunk(int first, int chunk, int stage) const {
    const int warp = threadIdx.x / 32, slice = warp % Tile::kSlices;
    const int thread = warp / Tile::kSlices * 32 + threadIdx.x % 32;
    const uint32_t to =
        shared_address(shared) + stage * Shape::kXStageBytes + slice * Tile::kTokens * Shape::kChunkPitch;
#pragma unroll
    for (int i = 0; i < Tile::kTokens * kPieces; i += kSliceThreads) {
      const int token = (i + thread) / kPieces, piece = (i + thread) % kPieces;
      if (token >= tokens) continue;
      const int column = first + chunk * Shape::kChunkColumns + piece * 8;
      const uint32_t at = to + token * Shape::kChunkPitch + Shape::exchanged(token, piece * 16);
      copy16_if_else_zeros(column < in, at, x + int64_t{token} * in + column);
    }
  }
  // Where there is more of it in registers than pays, it is loaded when it is stored.
  static constexpr bool kAhead = !Tile::kResident && !Shape::kRing && kOfThread <= 4;
  using Pieces = uint4[kAhead ? kOfThread : 1];
  __device__ __forceinline__ void load_chunk(int chunk, Pieces& v) const {
    if constexpr (kAhead) {
#pragma unroll
      for (int i = 0; i < kOfThread; ++i) {
        const ChunkPlace p = place(i, chunk);
        v[i] = p.slice < Tile::kSlices && p.token < tokens ? load(p.token, p.column) : uint4{0, 0, 0, 0};
      }
    }
  }
  __device__ __forceinline__ void store_chunk(int chunk, int stage, const Pieces& v) const {
#pragma unroll(kAhead ? kOfThread : 2)
    for (int i = 0; i < kOfThread; ++i) {
      const ChunkPlace p = place(i, chunk);
      const int at = (p.slice * Tile::kTokens + p.token) * Shape::kChunkPitch + p.piece * 16;
      if (p.slice < Tile::kSlices && p.token < tokens && p.column < Shape::blocks(in) * Shape::kBlock) {
        store(stage * Shape::kXStageBytes + at, p.token, p.column, kAhead ? v[i] : load(p.token, p.column));
      }
    }
  }
};

}  // namespace sparse24::cuda
