// Two of four along tokens where elements are codes of float8: four features at once, one a byte.
#pragma once

#include <cstdint>

namespace sparse24::cuda {

#ifdef __CUDACC__  // inline PTX; tests/cpp/emulator/ptx.h has it for hosts
// The top bit of each byte to all of its bits.
__device__ __forceinline__ uint32_t spread_signs_of_bytes(uint32_t w) {
  uint32_t out;
  asm("prmt.b32 %0, %1, 0, 0xba98;" : "=r"(out) : "r"(w));
  return out;
}
#endif

// Of four groups at once, whose elements are the bytes of four words: the elements that are kept first and second, and
// the nibbles, in both halves of their bytes: who collects them takes each from its place.
struct KeptCodes {
  uint32_t first, second;
  uint32_t nibbles;
};

// Keeps the two largest magnitudes of the codes v; NaN has the largest code. An element stays if it beats two of the
// other three; of equals the lower position does. As keep_two_pairs, with bytes: magnitudes have 7 bits.
__device__ __forceinline__ KeptCodes keep_two_codes(const uint32_t (&v)[4]) {
  constexpr uint32_t kMagnitudes = 0x7f7f7f7fu, kSigns = 0x80808080u;
  const auto beats = [&](int i, int j) { return (v[i] | kSigns) - (v[j] & kMagnitudes); };
  const auto majority = [](uint32_t a, uint32_t b, uint32_t c) { return (a & b) | (a & c) | (b & c); };
  const uint32_t b01 = beats(0, 1), b02 = beats(0, 2), b03 = beats(0, 3);
  const uint32_t b12 = beats(1, 2), b13 = beats(1, 3), b23 = beats(2, 3);
  const uint32_t k0 = spread_signs_of_bytes(majority(b01, b02, b03));
  const uint32_t k1 = spread_signs_of_bytes(majority(~b01, b12, b13));
  const uint32_t k2 = spread_signs_of_bytes(majority(~b02, ~b12, b23)), k3 = k0 ^ k1 ^ k2;
  const auto choose = [](uint32_t mask, uint32_t a, uint32_t b) { return (mask & a) | (~mask & b); };
  // Bits 0 and 1: of i0, 1 or 2 where 0 is not kept; bits 2 and 3: of i1, 3 where 3 is kept, 2 or 1.
  const uint32_t i0 = ~k0 & ~(k1 ^ 0x55555555u), i1 = k3 | (k2 ^ 0x55555555u);
  const uint32_t nibbles = (i0 & 0x33333333u) | (i1 & ~0x33333333u);
  return {choose(k0, v[0], choose(k1, v[1], v[2])), choose(k3, v[3], choose(k2, v[2], v[1])), nibbles};
}

}  // namespace sparse24::cuda
