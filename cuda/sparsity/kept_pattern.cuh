// Which two of four a token keeps, by its metadata. It picks a pair out of four elements, and puts one in its places.
#pragma once

#include "common/bits.cuh"

namespace sparse24::cuda {

// The nibbles of 8 blocks of a token, one in each byte: i0 | i1 << 2 of the kept pair.
struct Pattern {
  uint32_t columns[2];  // of 32 columns each

  // Returns the pair that is kept of four elements.
  __device__ __forceinline__ uint32_t kept(int b, uint32_t w01, uint32_t w23) const {
    // Each of i0 and i1, a nibble now, selects the bytes of its element: 0x10, 0x32, 0x54 or 0x76.
    const uint32_t indices = (columns[b / 4] | columns[b / 4] << 2) & 0x33333333u;
    return permute_bytes(w01, w23, permute_bytes(0x76543210u, 0, indices >> 8 * (b % 4)));
  }
  // Returns the four elements, zeros but for the pair.
  __device__ __forceinline__ void spread(int b, uint32_t pair, uint32_t& w01, uint32_t& w23) const {
    // The selector takes for each element two bytes of the pair (0x10, 0x32; 0x10 where both fit), or of zeros (0x54).
    const uint32_t shift0 = columns[b / 4] << 3 & 0x18181818u, shift1 = columns[b / 4] << 1 & 0x18181818u;
    const uint32_t selector =
        (0x54545454u ^ shift_left(0x66u, shift1 >> 8 * (b % 4))) & ~shift_left(0x66u, shift0 >> 8 * (b % 4));
    w01 = permute_bytes(pair, 0, selector & 0xffff);
    w23 = permute_bytes(pair, 0, selector >> 16);
  }
};

}  // namespace sparse24::cuda
