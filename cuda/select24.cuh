// Two of four: which values of a group stay, and their metadata nibble.
#pragma once

#include "vocabulary.cuh"

namespace sparse24::cuda {

// The choice for one group, in the order of its indices.
struct Choice {
  bool first_two, last_two;  // (0, 1) or (2, 3); else one of each half:
  bool second_of_first, second_of_last;

  // i0 | i1 << 2
  __device__ __forceinline__ uint32_t nibble() const {
    const uint32_t i0 = last_two ? 2u : first_two ? 0u : second_of_first;
    const uint32_t i1 = first_two ? 1u : last_two ? 3u : 2u + second_of_last;
    return i0 | i1 << 2;
  }
  template <class V>
  __device__ __forceinline__ V first(V v0, V v1, V v2) const {
    return last_two ? v2 : !first_two && second_of_first ? v1 : v0;
  }
  template <class V>
  __device__ __forceinline__ V second(V v1, V v2, V v3) const {
    return first_two ? v1 : last_two || second_of_last ? v3 : v2;
  }
};

// |y| as an integer: magnitudes order like their bits, and every NaN is one key above infinity.
template <Activation kAct>
__device__ __forceinline__ uint32_t magnitude_key(float y) {
  const uint32_t bits = __float_as_uint(y);
  if constexpr (kAct == Activation::kNone) return min(bits & 0x7fffffffu, 0x7f800001u);
  return bits;  // relu's max.NaN and the product return the canonical NaN, and +0 for what is not positive
}

// Keeps the two largest keys; of equals the lower index wins.
__device__ __forceinline__ Choice choose(uint32_t k0, uint32_t k1, uint32_t k2, uint32_t k3) {
  Choice c;
  c.second_of_first = k1 > k0;
  c.second_of_last = k3 > k2;
  const uint32_t high01 = c.second_of_first ? k1 : k0, low01 = c.second_of_first ? k0 : k1;
  const uint32_t high23 = c.second_of_last ? k3 : k2, low23 = c.second_of_last ? k2 : k3;
  c.first_two = low01 >= high23;
  c.last_two = low23 > high01;
  return c;
}

// One group of four 16-bit elements, activated and chosen.
template <class T, Activation kAct>
struct Group {
  uint16_t x[4];
  float y[4];
  Choice choice;

  __device__ __forceinline__ Group(uint16_t x0, uint16_t x1, uint16_t x2, uint16_t x3) : x{x0, x1, x2, x3} {
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] = activate<kAct>(to_float(T{}, x[i]));
    choice = choose(magnitude_key<kAct>(y[0]), magnitude_key<kAct>(y[1]), magnitude_key<kAct>(y[2]),
                    magnitude_key<kAct>(y[3]));
  }

  __device__ __forceinline__ uint32_t nibble() const { return choice.nibble(); }

  // The kept pair in the input's type.
  __device__ __forceinline__ uint32_t kept_16bit() const {
    const float y0 = choice.first(y[0], y[1], y[2]), y1 = choice.second(y[1], y[2], y[3]);
    const uint16_t x0 = choice.first(x[0], x[1], x[2]), x1 = choice.second(x[1], x[2], x[3]);
    return pack16(activated_bits<T, kAct>(x0, y0), activated_bits<T, kAct>(x1, y1));
  }
  // The kept pair in e4m3.
  __device__ __forceinline__ uint16_t kept_e4m3(float inverse_scale) const {
    return to_e4m3x2(__fmul_rn(choice.first(y[0], y[1], y[2]), inverse_scale),
                     __fmul_rn(choice.second(y[1], y[2], y[3]), inverse_scale));
  }
};

}  // namespace sparse24::cuda
