// The 2:4 rule: which two values of a group stay, and the nibble of metadata that says so.
//
// The kernels that compress are bound by integer instructions as much as by memory, so the selection works on 16-bit
// magnitudes with the position in the low bits of each key: a network of minima and maxima then yields both winners
// with their positions, ties already broken, and one byte permutation fetches the pair.
#pragma once

#include "common/bits.cuh"
#include "common/float8.cuh"

namespace sparse24::cuda {

// The kept pair of a group and 15 minus its nibble; a row collects nibbles as complements, which it only adds.
struct Kept {
  uint32_t pair;
  uint32_t complement;
};

// Keeps the two largest of four 16-bit magnitudes (order of their bits; NaN canonical, so the largest), given as words
// m01 and m23, and fetches their 16-bit values from v01 and v23.
__device__ __forceinline__ Kept keep_two(uint32_t m01, uint32_t m23, uint32_t v01, uint32_t v23) {
  // A key has the magnitude above and 3 - position below, so that all keys differ, and of equal magnitudes the lower
  // position has the larger key.
  const int k0 = int(m01 * 65536u + 3u), k1 = int(__byte_perm(m01, 2u, 0x3254));
  const int k2 = int(m23 * 65536u + 1u), k3 = int(m23 & 0xffff0000u);
  const int high01 = max(k0, k1), low01 = min(k0, k1);
  const int high23 = max(k2, k3), low23 = min(k2, k3);
  const int largest = max(high01, high23);
  const int next = max(min(high01, high23), max(low01, low23));
  const int p = largest & 3, q = next & 3;
  const uint32_t first = max(p, q), second = min(p, q);  // 3 - i0, 3 - i1
  // The selector takes bytes 2 i0, 2 i0 + 1, 2 i1 and 2 i1 + 1 of the four values.
  const uint32_t selector = 0x7676u - first * 0x22u - second * 0x2200u;
  return {permute_bytes(v01, v23, selector), first + 4u * second};
}

// The selection of two groups at once, whose elements are the low and the high halves of four words: the elements that
// are kept first and second, and the nibbles, which stand four times in their halves, so that who collects them takes
// each from its place.
struct KeptPairs {
  uint32_t first, second;
  uint32_t nibbles;
};

// Keeps the two largest magnitudes m of both, of the elements v. An element stays if it beats two of the other three;
// of equals the lower position does. 16-bit halves are compared by one subtraction: magnitudes have 15 bits, so that
// with bit 15 set in the minuend no half borrows from the other, and bit 15 says whether it was not the smaller one.
// Two stay, so that the last one does where exactly one of the others does.
__device__ __forceinline__ KeptPairs keep_two_pairs(const uint32_t (&m)[4], const uint32_t (&v)[4]) {
  const auto beats = [&](int i, int j) { return m[i] + 0x80008000u - m[j]; };
  const auto majority = [](uint32_t a, uint32_t b, uint32_t c) { return (a & b) | (a & c) | (b & c); };
  const uint32_t b01 = beats(0, 1), b02 = beats(0, 2), b03 = beats(0, 3);
  const uint32_t b12 = beats(1, 2), b13 = beats(1, 3), b23 = beats(2, 3);
  const uint32_t k0 = spread_signs(majority(b01, b02, b03)), k1 = spread_signs(majority(~b01, b12, b13));
  const uint32_t k2 = spread_signs(majority(~b02, ~b12, b23)), k3 = k0 ^ k1 ^ k2;
  const auto choose = [](uint32_t mask, uint32_t a, uint32_t b) { return (mask & a) | (~mask & b); };
  // Bits 0 and 1 are i0, which is 1 or 2 where 0 is not kept; bits 2 and 3 are i1, which is 3 where 3 is kept, else 2
  // or 1.
  const uint32_t i0 = ~k0 & ~(k1 ^ 0x55555555u), i1 = k3 | (k2 ^ 0x55555555u);
  const uint32_t nibbles = (i0 & 0x33333333u) | (i1 & ~0x33333333u);
  return {choose(k0, v[0], choose(k1, v[1], v[2])), choose(k3, v[3], choose(k2, v[2], v[1])), nibbles};
}

// One group of four 16-bit elements, chosen and activated by A, an ElementwiseActivation.
template <class A>
struct Group {
  Kept kept;

  __device__ __forceinline__ Group(const A&, uint32_t x01, uint32_t x23) {
    const uint32_t m01 = A::magnitudes(x01), m23 = A::magnitudes(x23);
    kept = A::kOfMagnitudes ? keep_two(m01, m23, m01, m23) : keep_two(m01, m23, x01, x23);
  }

  // Returns the kept pair in the input's type.
  __device__ __forceinline__ uint32_t kept_16bit() const { return A::values(kept.pair); }
  // Returns the kept pair in e4m3.
  __device__ __forceinline__ uint16_t kept_e4m3(float inverse_scale) const {
    return to_e4m3x2(__fmul_rn(A::value(kept.pair, 0), inverse_scale),
                     __fmul_rn(A::value(kept.pair, 1), inverse_scale));
  }
};

}  // namespace sparse24::cuda
