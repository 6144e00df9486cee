// Two of four along tokens of float8 codes, from the lanes that hold groups of four tokens whole.
//
// A warp owns eight groups g of tokens, and 64 features at a time: 8 blocks b of 8. Lane 4 g + q holds of blocks b and
// b + 1 features 2q and 2q + 1 of all four tokens, as words of four codes:
//
//     byte     0            1                2                3
//     feature  2q of b      2q + 1 of b      2q of b + 1      2q + 1 of b + 1
//
// All four are selected at once. float8 values are K-major: a kept pair is 16 bits, so the pairs of a block are an
// 8 x 8 matrix of 16-bit elements, groups x features, which one instruction transposes. Afterwards lane 4 f + i holds
// groups 2i and 2i + 1 of feature f, 4 of the 64 bytes that the feature has in a tile of 128 tokens. Nibbles go the
// same way, four blocks an element.
#pragma once

#include "common/bits.cuh"
#include "common/warp.cuh"
#include "gemm/sm90/epilogues/tokens.cuh"
#include "sparsity/select24_codes.cuh"

namespace sparse24::cuda {

// Byte q of each lane's word of a quad: afterwards lane q has bytes q of lanes 0 .. 3.
__device__ __forceinline__ uint32_t transpose_bytes_of_quad(uint32_t w, int q) {
  const bool high = q & 2, odd = q & 1;
  uint32_t got = __shfl_xor_sync(0xffffffffu, w, 2);
  w = high ? permute_bytes(got, w, 0x7632) : permute_bytes(w, got, 0x5410);
  got = __shfl_xor_sync(0xffffffffu, w, 1);
  return odd ? permute_bytes(got, w, 0x7351) : permute_bytes(w, got, 0x6240);
}

// One matrix along tokens: what is selected of two blocks is stored at once, its nibbles where four blocks are there.
class TokenStoreFp8 {
 public:
  __device__ __forceinline__ TokenStoreFp8(const TokenParams& p, const TokenPart& part) : p_(p), part_(part) {
    const int64_t pitch = round_up(part.tokens, 32) / 2, byte = 2 * (part.group - part.lane / 4) + 4 * (part.lane & 3);
    first_ = static_cast<uint8_t*>(p.values) + (part.feature + part.lane / 4) * pitch + byte;
    block_ = int(8 * pitch);
    // Features are a multiple of 32.
    for (int i = 0; i < 2; ++i) stored_[i] = part.feature + 32 * i < part.features && byte < pitch;
  }

  // Words of blocks b and b + 1: b = 0, 2, 4, 6 in this order.
  __device__ __forceinline__ void take(int b, const uint32_t (&tokens)[4]) {
    const KeptCodes kept = keep_two_codes(tokens);
    store_values(b, permute_bytes(kept.first, kept.second, 0x5140));
    store_values(b + 1, permute_bytes(kept.first, kept.second, 0x7362));
    // Both blocks of a feature in a byte: the low half is what is left.
    const uint32_t nibbles = (kept.nibbles & 0x0f0fu) | (kept.nibbles >> 16 & 0xf0f0u);
    if (b % 4 == 0) {
      nibbles_ = nibbles;
    } else {
      store_meta(b - 2, permute_bytes(nibbles_, nibbles, 0x5140));
    }
  }

 private:
  // Pairs of features 2q and 2q + 1 of block b.
  __device__ __forceinline__ void store_values(int b, uint32_t pairs) const {
    const uint32_t groups = transpose_8x8(pairs);
    store4_if(stored_[b / 4], first_ + int64_t(b) * block_, groups);
  }
  // Nibbles of blocks b .. b + 3, lowest first, of features 2q and 2q + 1.
  __device__ __forceinline__ void store_meta(int b, uint32_t nibbles) const {
    const uint32_t groups = transpose_8x8(nibbles);                       // 2i in the low half, 2i + 1 in the high one
    const uint32_t even = (groups & 0x0f0fu) | (groups >> 12 & 0xf0f0u);  // of blocks b and b + 2, both groups
    const uint32_t odd = (groups >> 4 & 0x0f0fu) | (groups >> 16 & 0xf0f0u);  // of blocks b + 1 and b + 3
    const int lane = part_.lane, i = lane & 3;
    const uint32_t word = transpose_bytes_of_quad(permute_bytes(even, odd, 0x5140), i);
    // With its padding: blocks of 128 tokens, which a tile is, and 128 features. Orders of tiles with a swizzle have
    // some that lie beyond.
    const int m_meta = int(round_up(part_.features, kMetaRowPadding)), tile = part_.group / 32;
    const int feature = part_.feature + 8 * (b + i) + lane / 4;
    const int64_t row = int64_t(tile) * m_meta + feature;
    store4_if(128 * tile < part_.tokens && feature < m_meta, p_.meta + row * 16 + (part_.group % 32 / 8) * 4, word);
  }

  TokenParams p_;
  TokenPart part_;
  uint8_t* first_;  // of this lane: four bytes of block 0
  int block_;       // bytes from one block to the next
  bool stored_[2];  // whether blocks 0 .. 3 and 4 .. 7 are
  uint32_t nibbles_;
};

}  // namespace sparse24::cuda
