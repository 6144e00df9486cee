// Two of four along tokens, from what an epilogue holds of a result that is 2:4 along features.
//
// A warp owns 16 tokens x 64 features: 8 blocks b of 8 columns. Lane 4 r + q holds of each block the kept pair and the
// nibble of one group of four features of one token:
//
//     lane q of a quad     token     features of block b
//     0                    r         8b     .. 8b + 3
//     1                    r + 8     8b     .. 8b + 3
//     2                    r         8b + 4 .. 8b + 7
//     3                    r + 8     8b + 4 .. 8b + 7
//
// so that lanes which differ in bits 2 and 3 share a group of four tokens, and the same features. They trade columns
// for tokens, after which the bits count features instead:
//
//     bit of the lane      0               1                  2, 3            4
//     before               token + 8       feature + 4        token + 1, 2    token + 4
//     after                token + 8       feature + 4        feature + 1, 2  token + 4
//
// Each lane then selects for its one feature, by the code of compress: results are bit-identical to decompress and
// compress.
#pragma once

#include "quad.cuh"
#include "select24.cuh"
#include "sparse24/format.h"

namespace sparse24::cuda {

// What is kept of a token's 64 features, in the lane that owns it.
struct KeptFeatures {
  uint32_t pairs[8];    // of block b
  uint32_t nibbles[2];  // of all 32 columns of blocks 0 .. 3 and 4 .. 7

  __device__ __forceinline__ uint32_t nibble(int b, bool high) const {
    return nibbles[b / 4] >> (8 * (b % 4) + 4 * high) & 0xf;
  }
};

// Four 16-bit elements: the features of one token, or the tokens of one feature.
struct Four {
  uint32_t w01, w23;

  // A kept pair at its places, zeros elsewhere.
  __device__ __forceinline__ static Four of(uint32_t pair, uint32_t nibble) {
    // Selects for each element its two bytes of the pair (0x10, 0x32), or of a word of zeros (0x44).
    const uint32_t selector = 0x44444444u - (0x34u << 8 * (nibble & 3)) - (0x12u << 8 * (nibble >> 2));
    return {permute_bytes(pair, 0, selector & 0xffff), permute_bytes(pair, 0, selector >> 16)};
  }
};

// Four features of one token each to four tokens of one feature each, over bits 2 and 3 of the lane. Several at a time:
// exchanges keep their order in the program, so that one at a time each would wait for the one before.
template <int kCount>
__device__ __forceinline__ void transpose(Four (&f)[kCount], int lane) {
  const bool odd = lane & 4;
  // To two features of two tokens each: of tokens 0 and 2, or of 1 and 3.
#pragma unroll
  for (int i = 0; i < kCount; ++i) transpose_pair<8>(f[i].w01, f[i].w23, lane & 8);
  uint32_t got[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    got[i] = __shfl_xor_sync(0xffffffffu, __byte_perm(f[i].w01, f[i].w23, odd ? 0x5410 : 0x7632), 4);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const uint32_t mine = __byte_perm(f[i].w01, f[i].w23, odd ? 0x7632 : 0x5410);
    f[i] = {__byte_perm(mine, got[i], odd ? 0x1054 : 0x5410), __byte_perm(mine, got[i], odd ? 0x3276 : 0x7632)};
  }
}

// How many tokens are not zero, by feature: byte b % 4 of word b / 4. A warp has no more than 255 tokens.
struct NonZeros {
  uint32_t bytes[2] = {};

  __device__ __forceinline__ void see(int b, Four tokens) {
    // A magnitude that is not 0 carries into bit 15, NaN too.
    const auto flags = [](uint32_t w) { return ((w & 0x7fff7fffu) + 0x7fff7fffu) >> 15 & 0x00010001u; };
    bytes[b / 4] += (flags(tokens.w01) + flags(tokens.w23)) * 0x10001u >> 16 << 8 * (b % 4);
  }
  // Adds them to the counts of 64 features. Bits 0 and 4 of the lane, which share features, share the work.
  __device__ __forceinline__ void collect(int32_t* counts, int feature, int features) const {
    const int lane = threadIdx.x & 31, first = lane & 1, second = lane >> 4;
    const uint32_t got = __shfl_xor_sync(0xffffffffu, first ? bytes[0] : bytes[1], 1);
    uint32_t sum = (first ? bytes[1] : bytes[0]) + got;
    sum += __shfl_xor_sync(0xffffffffu, sum, 16);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int b = 2 * second + i, count = int(sum >> 8 * b & 0xff);
      const int f = feature + 32 * first + 8 * b + 4 * (lane >> 1 & 1) + (lane >> 2 & 3);
      if (count > 0 && f < features) atomicAdd(counts + f, count);
    }
  }
};

// Where the stored form goes: Operand::of(tokens, features, ..., Dim::kTokens) of format.h.
struct TokenParams {
  void* values;
  uint8_t* meta;
};

// What a warp holds: tokens token .. token + 15 and features feature .. feature + 63 of [tokens, features].
struct TokenPart {
  int tokens, features;
  int token, feature;
};

// Compresses two matrices with the same pattern along tokens, and counts in the first; T is a 16-bit type. In one loop:
// what follows from the pattern, and the places of both, are the same.
template <class T>
__device__ __forceinline__ void store_tokens(const TokenParams (&p)[2], const TokenPart& part,
                                             const KeptFeatures (&kept)[2], NonZeros& count) {
  const int lane = threadIdx.x & 31;
  const bool odd = lane & 1, high = lane >> 1 & 1;
  const int group = 2 * odd + (lane >> 4), place = lane >> 2 & 3;  // of tokens in the 16; in the four features
  constexpr int kBlocks = 2;                                       // at once, of each matrix
  uint32_t complements[2][4] = {};                                 // 15 - nibble, of blocks 2j and 2j + 1
#pragma unroll
  for (int first = 0; first < 8; first += 4) {
    uint32_t w[2][4];
#pragma unroll
    for (int i = 0; i < 4; i += kBlocks) {
      Four tokens[2 * kBlocks];  // of both matrices, by block
#pragma unroll
      for (int j = 0; j < 2 * kBlocks; ++j) {
        const int b = first + i + j / 2;
        tokens[j] = Four::of(kept[j % 2].pairs[b], kept[0].nibble(b, high));
      }
      transpose(tokens, lane);
#pragma unroll
      for (int j = 0; j < 2 * kBlocks; ++j) {
        const int b = first + i + j / 2;
        if (j % 2 == 0) count.see(b, tokens[j]);
        const Kept two = Group<T, Activation::kNone>(tokens[j].w01, tokens[j].w23).kept;
        w[j % 2][b % 4] = two.pair;
        complements[j % 2][b / 2] |= two.complement << (16 * (b % 2) + 4 * group);
      }
    }
    // Lanes that hold neighbouring features take a block each: 8 bytes of both rows of values.
#pragma unroll
    for (int x = 0; x < 2; ++x) transpose_quad<4>(w[x], place);
    const int token = part.token + 4 * group, column = part.feature + 8 * (first + place) + 4 * high;
    if (token < part.tokens && column < part.features) {
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        T* values = static_cast<T*>(p[x].values) + int64_t(token / 2) * part.features + column;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          *reinterpret_cast<uint2*>(values + i * int64_t(part.features)) = make_uint2(
              __byte_perm(w[x][0], w[x][1], i ? 0x7632 : 0x5410), __byte_perm(w[x][2], w[x][3], i ? 0x7632 : 0x5410));
        }
      }
    }
  }
  // The four lanes that share features complete each other's 16 tokens, and take two blocks each: rows f and f + 8 of
  // 16, neighbours in the 128 bytes that format.h draws.
  uint32_t half[2][2], nibbles[2];
#pragma unroll
  for (int x = 0; x < 2; ++x) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t* c = complements[x];
      const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? c[i] : c[i + 2], 1);
      half[x][i] = (odd ? c[i + 2] : c[i]) | got;
    }
  }
#pragma unroll
  for (int x = 0; x < 2; ++x) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, lane >> 4 ? half[x][0] : half[x][1], 16);
    nibbles[x] = ~((lane >> 4 ? half[x][1] : half[x][0]) | got);
  }
  // With its padding: blocks of 64 tokens and 128 features. Orders of tiles with a swizzle have some that lie beyond.
  const int m_meta = int(round_up(part.features, kMetaRowPadding));
  if (part.token / 64 * 64 < part.tokens && part.feature < m_meta) {
    const int row = part.feature + 16 * group;
    const int64_t chunk = int64_t(part.token / 64) * (m_meta / 16) + row / 16;
    const int byte = part.token % 32 / 16 * 64 + (4 * high + place) * 8 + part.token % 64 / 32 * 4;
#pragma unroll
    for (int x = 0; x < 2; ++x) *reinterpret_cast<uint32_t*>(p[x].meta + chunk * 128 + byte) = nibbles[x];
  }
}

}  // namespace sparse24::cuda
