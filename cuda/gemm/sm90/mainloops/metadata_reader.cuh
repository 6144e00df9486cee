// What a thread of grouped_sparse.cuh reads of a stage's metadata, which format.h draws: a word for each of two times
// 64 rows, h, and of two mma, k.
//
// Lane 4 g + q of warp w has rows g and g + 8 of 16, for either h. In 16 bits it has 16 columns of both rows, with an
// odd q the second 16 of an mma; in fp8 32 columns of row g + 8 (q % 2).
#pragma once

#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>

#include "common/bits.cuh"

namespace sparse24::cuda {

// Tokens are in groups: then the weight's features are in their own order, and else in that of packed.h.
template <bool kGroupsTokens, bool kFp8>
class MetadataReader;

// 16 bits, rows of packed.h: words of rows r and r + 8, which are those of a thread.
template <>
class MetadataReader<false, false> {
 public:
  using Words = uint4;  // of h and k

  CUTLASS_DEVICE MetadataReader(int thread, int zero) : in_order_(0x3210 + zero) {
    const int w = thread / 32, g = thread % 32 / 4, q = thread % 4;
    first_ = (2 * w + g / 4) * 128 + (q & 1) * 64 + (g & 3) * 16;
  }

  CUTLASS_DEVICE void load(const uint8_t* stage, Words& words) const {
    words = *reinterpret_cast<const uint4*>(stage + first_);
  }

  template <class Metadata>
  CUTLASS_DEVICE void arrange(Words const& words, Metadata& metadata) const {
    cute::Tensor out = cute::recast<uint32_t>(metadata);
    out(0, 0, 0) = permute_bytes(words.x, words.x, in_order_);
    out(0, 0, 1) = permute_bytes(words.y, words.y, in_order_);
    out(0, 1, 0) = permute_bytes(words.z, words.z, in_order_);
    out(0, 1, 1) = permute_bytes(words.w, words.w, in_order_);
  }

 private:
  int first_;
  uint32_t in_order_;  // no constant, or the compiler would load to the registers that mma in flight read
};

// 16 bits: features 4 g .. 4 g + 3 of 32, of which a thread loads four of eight rows at once, in a half of 16.
template <>
class MetadataReader<true, false> {
 public:
  struct Words {
    uint4 of_features[2];  // h; of the first feature both mma, and of the second
  };

  CUTLASS_DEVICE MetadataReader(int thread, int) {
    const int w = thread / 32, g = thread % 32 / 4, q = thread % 4;
    first_ = (2 * w + g / 4) * 128 + (q & 1) * 64 + (g & 1) * 32;
    halves_ = g & 2 ? 0x7632 : 0x5410;
  }

  CUTLASS_DEVICE void load(const uint8_t* stage, Words& words) const {
    CUTLASS_PRAGMA_UNROLL
    for (int h = 0; h < 2; ++h) words.of_features[h] = *reinterpret_cast<const uint4*>(stage + first_ + 16 * h);
  }

  // metadata: (a word, h, k).
  template <class Metadata>
  CUTLASS_DEVICE void arrange(Words const& words, Metadata& metadata) const {
    cute::Tensor out = cute::recast<uint32_t>(metadata);
    CUTLASS_PRAGMA_UNROLL
    for (int h = 0; h < 2; ++h) {
      const uint4& w = words.of_features[h];
      out(0, h, 0) = permute_bytes(w.x, w.z, halves_);
      out(0, h, 1) = permute_bytes(w.y, w.w, halves_);
    }
  }

 private:
  int first_;
  uint32_t halves_;
};

// fp8: a word each. In one order for all lanes four of them would want words of the same bank at once: so each begins
// with another.
template <bool kGroupsTokens>
class MetadataReader<kGroupsTokens, true> {
 public:
  struct Words {
    uint32_t in_order[4];
  };

  CUTLASS_DEVICE MetadataReader(int thread, int) {
    const int w = thread / 32, g = thread % 32 / 4, q = thread % 4;
    const int row = kGroupsTokens ? 32 * w + 4 * g + (q & 1) : 32 * w + 16 * (g / 4) + 8 * (q & 1) + 2 * (g & 3);
    first_ = 16 * row + 4 * (q >> 1);
    order_ = kGroupsTokens ? g >> 1 : g / 4 * 2 + (q & 1);
    of_k_ = order_ & 1 ? 0x7654 : 0x3210;
    of_h_ = order_ & 2 ? 0x7654 : 0x3210;
  }

  CUTLASS_DEVICE void load(const uint8_t* stage, Words& words) const {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int at = i ^ order_;  // 2 h + k
      words.in_order[i] = *reinterpret_cast<const uint32_t*>(stage + first_ + at / 2 * kBytesOfH + at % 2 * 8);
    }
  }

  template <class Metadata>
  CUTLASS_DEVICE void arrange(Words const& words, Metadata& metadata) const {
    uint32_t w[4];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 4; ++i) {
      w[i] = words.in_order[i];
      asm volatile("" : "+r"(w[i]));  // no sooner, or the compiler would trade them, and wait, where they are loaded
    }
    trade(w[0], w[1], of_k_);
    trade(w[2], w[3], of_k_);
    trade(w[0], w[2], of_h_);
    trade(w[1], w[3], of_h_);
    cute::Tensor out = cute::recast<uint32_t>(metadata);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 4; ++i) out(0, i / 2, i % 2) = w[i];
  }

 private:
  static constexpr int kBytesOfH = kGroupsTokens ? 32 : 16;  // two features, or one

  // Swaps two words, or does not.
  CUTLASS_DEVICE static void trade(uint32_t& a, uint32_t& b, uint32_t selector) {
    const uint32_t was_a = a;
    a = permute_bytes(a, b, selector);
    b = permute_bytes(b, was_a, selector);
  }

  int first_, order_;
  uint32_t of_k_, of_h_;  // selectors
};

}  // namespace sparse24::cuda
