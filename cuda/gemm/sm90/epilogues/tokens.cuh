// The selection of two of four along tokens, in lanes that hold groups of four tokens whole.
//
// A warp owns eight groups g of tokens, and 64 features at a time: 8 blocks b of 8. Lane 4 g + q holds of block b
// features 2q and 2q + 1 of all four tokens, as words of two features. Both are selected at once, by keep_two_pairs, in
// the order that compress has: results are bit-identical to decompress and compress.
#pragma once

#include "common/activation.cuh"
#include "common/warp.cuh"
#include "sparse24/format.h"
#include "sparsity/select24.cuh"

namespace sparse24::cuda {

// Trades two features of all four tokens of a group for four features of two tokens, kCount times: lanes that differ in
// bit 0 have the same tokens, and features beside each other. The even lane gets tokens 0 and 1, the odd lane 2 and 3.
// Word s then has features 0 and 1 of the lane's token s, and word s + 2 features 2 and 3. The trade is its own
// inverse.
template <int kCount>
__device__ __forceinline__ void trade_features_for_tokens(uint32_t (&w)[kCount][4], int lane) {
  const bool odd = lane & 1;
  uint32_t got[kCount][2];
#pragma unroll
  for (int i = 0; i < 2 * kCount; ++i)
    got[i / 2][i % 2] = __shfl_xor_sync(0xffffffffu, odd ? w[i / 2][i % 2] : w[i / 2][i % 2 + 2], 1);
#pragma unroll
  for (int i = 0; i < 2 * kCount; ++i) (odd ? w[i / 2][i % 2] : w[i / 2][i % 2 + 2]) = got[i / 2][i % 2];
}

// Counts how many tokens are not zero, by feature: byte 2 c + b % 2 of word b / 2 counts for feature 2q + c of block b.
struct NonZeros {
  uint32_t bytes[4] = {};

  __device__ __forceinline__ void see(int b, const uint32_t (&tokens)[4]) {
    uint32_t sum = 0;
    // A magnitude that is not 0 carries into bit 15, NaN too.
#pragma unroll
    for (uint32_t w : tokens) sum += ((w & 0x7fff7fffu) + 0x7fff7fffu) >> 15 & 0x00010001u;
    bytes[b / 2] += sum << 8 * (b % 2);
  }
  // Adds up what the eight lanes with the same features have seen: they share the work, two features each.
  __device__ __forceinline__ void collect(int32_t* counts, int feature, int features, int lane) {
    const int g = lane >> 2;
    uint32_t sum[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      transpose_pair<16>(bytes[i], bytes[i + 2], g & 4);
      sum[i] = bytes[i] + bytes[i + 2];
    }
    transpose_pair<8>(sum[0], sum[1], g & 2);
    uint32_t of_word = sum[0] + sum[1];
    of_word += __shfl_xor_sync(0xffffffffu, of_word, 4);
    const int first_block = 2 * ((g >> 2) * 2 + (g >> 1 & 1)), c = g & 1;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int count = int(of_word >> (16 * c + 8 * i) & 0xff);
      const int f = feature + 8 * (first_block + i) + 2 * (lane & 3) + c;
      if (count > 0 && f < features) atomicAdd(counts + f, count);
    }
  }
};

// Where the stored form goes, which is that of Operand::of(tokens, features, ..., Dim::kTokens) of format.h.
struct TokenParams {
  void* values;
  uint8_t* meta;
};

// What a lane holds: group `group` of the tokens, and of features feature .. feature + 63 its columns.
struct TokenPart {
  int tokens, features;
  int group, feature;
  int lane;
};

// One matrix along tokens. What is selected of two blocks is stored at once, while its nibbles are collected.
template <class T>
class TokenStore {
 public:
  __device__ __forceinline__ TokenStore(const TokenParams& p, const TokenPart& part) : p_(p), part_(part) {}

  // Takes the words of blocks b and b + 1, for b = 0, 4, 2, 6 in this order.
  __device__ __forceinline__ void take(int b, const uint32_t (&first)[4], const uint32_t (&second)[4]) {
    const KeptPairs kept[2] = {keep(first), keep(second)};
    store_values(b, kept[0].first, kept[1].first, 0);
    store_values(b, kept[0].second, kept[1].second, 1);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // Lanes whose groups are neighbours complete each other's 16 tokens; half of them take blocks 0 .. 3.
      const uint32_t nibbles = kept[i].nibbles & 0x000f000fu << 4 * (part_.group & 3);
      if (b < 4) {
        nibbles_[b + i] = nibbles;
      } else {
        transpose_pair<8>(nibbles_[b - 4 + i], nibbles_[b + i] = nibbles, part_.group & 2);
        nibbles_[b - 4 + i] |= nibbles_[b + i];
      }
    }
  }

  // Stores the metadata. Each lane takes two blocks at last, rows f and f + 8 of 16, which are neighbours in the 128
  // bytes that format.h draws.
  __device__ __forceinline__ void store_meta() {
    const int lane = part_.lane, place = part_.group & 3;
    uint32_t both[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      transpose_pair<4>(nibbles_[i], nibbles_[i + 2], place & 1);
      both[i] = nibbles_[i] | nibbles_[i + 2];
    }
    // Its padding, to blocks of 64 tokens and 128 features, is stored too. Orders of tiles with a swizzle have tiles
    // that lie beyond it.
    const int m_meta = int(round_up(part_.features, kMetaRowPadding)), token = 4 * part_.group / 16 * 16;
    if (token / 64 * 64 >= part_.tokens || part_.feature >= m_meta) return;
    const int row = part_.feature + 16 * place + 2 * (lane & 3);
    const int64_t chunk = int64_t(token / 64) * (m_meta / 16) + row / 16;
    uint8_t* of_row = p_.meta + chunk * 128 + token % 32 / 16 * 64 + row % 8 * 8 + token % 64 / 32 * 4;
    *reinterpret_cast<uint32_t*>(of_row) = __byte_perm(both[0], both[1], 0x5410);
    *reinterpret_cast<uint32_t*>(of_row + 8) = __byte_perm(both[0], both[1], 0x7632);
  }

 private:
  __device__ __forceinline__ static KeptPairs keep(const uint32_t (&v)[4]) {
    uint32_t m[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) m[i] = ElementwiseActivation<T, Activation::kNone>::magnitudes(v[i]);
    return keep_two_pairs(m, v);
  }
  // Stores row 2 group + i of the values. Lanes that hold neighbouring features take a block each, so that a quad
  // writes a sector of 32 bytes.
  __device__ __forceinline__ void store_values(int b, uint32_t first, uint32_t second, int i) {
    const int lane = part_.lane, odd = lane & 1;
    transpose_pair<1>(first, second, odd);
    if (4 * part_.group < part_.tokens && part_.feature + 8 * b < part_.features) {
      const int column = part_.feature + 8 * odd + 4 * (lane >> 1 & 1);
      T* values = static_cast<T*>(p_.values) + int64_t(2 * part_.group + i) * part_.features + column;
      *reinterpret_cast<uint2*>(values + 8 * b) = make_uint2(first, second);
    }
  }

  TokenParams p_;
  TokenPart part_;
  uint32_t nibbles_[8];
};

}  // namespace sparse24::cuda
