// The epilogue of linear_gradient_fp8 with a 2:4 weight, whose product is dy.T: rows of the tile are features, columns
// are tokens. It stores what epilogues/gradient_fp8.cuh does.
//
// A lane's fragment holds whole groups, as epilogues/gradient_transposed.cuh draws: lane 4 g + q has four features of
// group 8 w + g, and of columns 16 j .. 16 j + 15 the four tokens of group 4 j + q. Along features, a kept pair of
// codes is 16 bits, and those of a block of 8 columns are an 8 x 8 matrix of groups and tokens, which one instruction
// transposes: a lane loads and stores 8 features of one token, of which four lanes make a sector's half. So do nibbles
// of four blocks. Along tokens, lanes of a quad trade the features of a group, so that each has one feature of all 64
// tokens: 32 bytes of values, and 8 of metadata.
#pragma once

#include "gemm/sm90/epilogues/derivative_fp8.cuh"
#include "gemm/sm90/epilogues/gradient_fp8.cuh"
#include "gemm/sm90/epilogues/gradient_transposed.cuh"
#include "gemm/sm90/epilogues/tokens_fp8.cuh"

namespace sparse24::cuda {

// Of each byte the low nibble, then of each the high one: 16 bits each.
__device__ __forceinline__ uint32_t split_nibbles(uint32_t w) {
  const uint32_t low = w & 0x0f0f0f0fu, high = w >> 4 & 0x0f0f0f0fu;
  return permute_bytes(low | low >> 4, high | high >> 4, 0x6420);
}

// Lane q of a quad has elements of 16 bits of four features, two a word; afterwards it has those of feature q of lanes
// 0 .. 3, in the same form.
__device__ __forceinline__ void transpose_halves_of_quad(uint32_t (&w)[2], int q) {
  transpose_pair<2>(w[0], w[1], q & 2);
  const bool odd = q & 1;
  // Of both words the half that the other lane wants.
  const uint32_t got = __shfl_xor_sync(0xffffffffu, permute_bytes(w[0], w[1], odd ? 0x5410 : 0x7632), 1);
  const uint32_t first = w[0], second = w[1];
  w[0] = odd ? permute_bytes(got, first, 0x7610) : permute_bytes(first, got, 0x5410);
  w[1] = odd ? permute_bytes(got, second, 0x7632) : permute_bytes(second, got, 0x7610);
}

// Tokens and features come in multiples of 32: warps have all of a feature's tokens of 32, or none.
template <int kTileM, int kTileN>
class TransposedGradientFp8Epilogue : public EpilogueBase<GradientFp8Params, NoStorage> {
  using Base = EpilogueBase<GradientFp8Params, NoStorage>;
  using Base::p_;

 public:
  using Base::Base;

  template <class Problem, class BlockShape, class BlockCoord, class Engine, class Layout, class TiledMma,
            class Residue>
  CUTLASS_DEVICE void operator()(Problem const&, BlockShape const& block_shape, BlockCoord const& block_coord,
                                 cute::Tensor<Engine, Layout> const& acc, TiledMma const&, Residue const&,
                                 int thread_idx, char*) const {
    using namespace cute;
    static_assert(kTileM == 4 * kTileGroups && kTileN % kPartTokens == 0, "whole parts");
    static_assert(is_same_v<decltype(take<0, 2>(block_shape)), Shape<Int<kTileM>, Int<kTileN>>>, "this tile");
    static_assert(decltype(size(TiledMma{}))::value == 128 && decltype(size<1>(acc))::value == 2,
                  "one warpgroup owns the tile, 64 rows at a time");
    const int lane = lane_of_tile();
    const Lane at{lane, int(get<0>(block_coord)) * kTileM + thread_idx / 32 * 32};
    const int first_token = int(get<1>(block_coord)) * kTileN;
    // The registers of the first part's accumulators, once it is rounded, are room for the first loads.
    TransposedPart parts[kParts];
    round_part<__nv_bfloat16>(acc, 0, parts[0]);
    const int4 slots = load_slots(at);
    Forward next = load(at, first_token);
    CUTLASS_PRAGMA_UNROLL
    for (int part = 1; part < kParts; ++part) round_part<__nv_bfloat16>(acc, part, parts[part]);
    DerivativeFp8::Seen seen = p_.derivative.begin();
    CUTLASS_PRAGMA_NO_UNROLL
    for (int part = 0; part < kParts; ++part) {
      const int place = first_token + part * kPartTokens;
      const Forward y = next;
      // On its way while this part is computed.
      if (part + 1 < kParts) next = load(at, place + kPartTokens);
      visit(at, place, parts[0], y, slots, seen);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 1; i < kParts; ++i) parts[i - 1] = parts[i];
    }
    p_.derivative.collect(seen, lane);
  }

 private:
  static constexpr int kPartTokens = TransposedPart::kTokens, kGroups = TransposedPart::kGroups;
  static constexpr int kBlocks = kPartTokens / 8;
  static constexpr int kParts = kTileN / kPartTokens;

  // A lane, and the first of its warp's 32 features.
  struct Lane {
    int lane, feature;
    CUTLASS_DEVICE int q() const { return lane & 3; }
    CUTLASS_DEVICE int g() const { return lane >> 2; }
  };
  // What a lane loads, as it lies in memory: of column g of each block 8 features, and of one of four blocks, the q-th,
  // the nibbles of all 32.
  struct Forward {
    uint32_t codes[kBlocks];
    uint32_t meta[kBlocks / 4];
  };

  CUTLASS_DEVICE bool exists(Lane const& at, int place) const { return place < p_.tokens && at.feature < p_.features; }
  // The token in a column of 8 of block b of the part at a place.
  CUTLASS_DEVICE int64_t token(int place, int b, int column) const {
    const int row = place + b / 2 * 16 + column / 2 * 4 + b % 2 * 2 + column % 2;
    return p_.quarter ? row % 4 * p_.quarter + row / 4 : row;
  }
  CUTLASS_DEVICE int64_t value_index(Lane const& at, int place, int b) const {
    return token(place, b, at.g()) * (p_.features / 2) + at.feature / 2 + 4 * at.q();
  }

  // Zeros that keep (0, 1) where there is nothing. Not load16: the kernel may have started while the one before it was
  // writing these, so they are not read-only to it.
  CUTLASS_DEVICE Forward load(Lane const& at, int place) const {
    Forward out{{}, {0x44444444u, 0x44444444u}};
    const int64_t m_meta = round_up(p_.tokens, kMetaRowPadding);
    const uint8_t* column = p_.meta + at.feature / 128 * m_meta * 16 + at.feature % 128 / 8;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kBlocks / 4; ++i) {
      if (!exists(at, place + 32 * i)) continue;
      out.meta[i] = *reinterpret_cast<const uint32_t*>(column + token(place + 32 * i, at.q(), at.g()) * 16);
      CUTLASS_PRAGMA_UNROLL
      for (int b = 4 * i; b < 4 * i + 4; ++b)
        out.codes[b] = *reinterpret_cast<const uint32_t*>(p_.y + value_index(at, place, b));
    }
    return out;
  }

  CUTLASS_DEVICE int4 load_slots(Lane const& at) const {
    int4 slots{-1, -1, -1, -1};
    if (p_.slots && at.feature < p_.features)
      slots = *reinterpret_cast<const int4*>(p_.slots + at.feature + 4 * at.g());
    return slots;
  }

  // Computes and stores everything of 64 tokens.
  CUTLASS_DEVICE void visit(Lane const& at, int place, TransposedPart const& dy, Forward const& y, int4 slots,
                            DerivativeFp8::Seen& seen) const {
    const bool hot = (slots.x & slots.y & slots.z & slots.w) >= 0;
    uint32_t nibbles = 0;                // of y's kept pairs: of blocks 4 i .. 4 i + 3, two columns in the halves
    uint32_t along[2][kGroups][2];       // of y and of dh: kept pairs along tokens, two features a word
    uint32_t of_tokens[2][kGroups / 2];  // theirs: a feature a byte, two groups of tokens
    CUTLASS_PRAGMA_UNROLL
    for (int j = 0; j < kGroups; ++j) {
      const bool there = exists(at, place + 16 * j);
      if (j % 2 == 0) nibbles = transpose_8x8(split_nibbles(transpose_bytes_of_quad(y.meta[j / 2], at.q())));
      const Pattern pattern = pattern_of(nibbles, j % 2);
      uint32_t kept[4], codes[2];  // codes of tokens 0 and 1, 2 and 3
      uint16_t of_y[4], dh[4];
      CUTLASS_PRAGMA_UNROLL
      for (int h = 0; h < 2; ++h) codes[h] = transpose_8x8(y.codes[2 * j + h]);
      CUTLASS_PRAGMA_UNROLL
      for (int t = 0; t < 4; ++t) {
        kept[t] = there ? pattern.kept(t, dy.of[j][t][0], dy.of[j][t][1]) : 0u;
        of_y[t] = uint16_t(codes[t / 2] >> 16 * (t % 2));
      }
      float largest = 0.f;
      DerivativeFp8::apply(kept, of_y, dh, seen.to_code, largest);
      seen.largest = fmaxf(seen.largest, largest);
      if (__builtin_expect(DerivativeFp8::exceeds(largest, seen.to_code), false))
        seen.saturated += DerivativeFp8::saturated_of(kept, of_y, seen.to_code);
      CUTLASS_PRAGMA_UNROLL
      for (int h = 0; h < 2; ++h) {
        const uint32_t of_token = transpose_8x8(pack16(dh[2 * h], dh[2 * h + 1]));
        store4_if(there, p_.dh + value_index(at, place, 2 * j + h), of_token);
      }
      uint32_t dense[2][4];  // of y and of dh: four features of the tokens
      spread(pattern.columns[0], of_y, dh, dense);
      if (hot && there) store_hot(place + 16 * j + 4 * at.q(), slots, dense);
      CUTLASS_PRAGMA_UNROLL
      for (int which = 0; which < 2; ++which) {
        const KeptCodes chosen = keep_two_codes(dense[which]);
        along[which][j][0] = permute_bytes(chosen.first, chosen.second, 0x5140);
        along[which][j][1] = permute_bytes(chosen.first, chosen.second, 0x7362);
        uint32_t& of_two = of_tokens[which][j / 2];
        of_two = j % 2 == 0 ? chosen.nibbles & 0x0f0f0f0fu : of_two | (chosen.nibbles & 0xf0f0f0f0u);
      }
    }
    CUTLASS_PRAGMA_UNROLL
    for (int which = 0; which < 2; ++which) {
      store_values(at, place, p_.along_tokens[which], along[which]);
      store_meta(at, place, p_.along_tokens[which].meta, of_tokens[which]);
    }
  }

  // The nibbles of four tokens of the first or the second group of 32, one a byte.
  CUTLASS_DEVICE static Pattern pattern_of(uint32_t nibbles, int second) {
    const uint32_t twice = permute_bytes(nibbles, 0, second ? 0x3131 : 0x2020);
    return {{(twice & 0x00000f0fu) | (twice >> 4 & 0x0f0f0000u), 0}};
  }

  // Pairs of codes to four features each, zeros but for the pair.
  CUTLASS_DEVICE static void spread(uint32_t nibbles, uint16_t const (&y)[4], uint16_t const (&dh)[4],
                                    uint32_t (&dense)[2][4]) {
    // Selectors of permute_bytes of four tokens, one a byte: of features 0 and 1, then of 2 and 3. A feature's nibble
    // is 4, a zero, but 1 at i1 and 0 at i0; if both are the same it is the first.
    const uint32_t i0 = indices(nibbles), i1 = indices(nibbles >> 2);
    const uint32_t low = permute_bytes(0, 0x44441441u, i1) & permute_bytes(0, 0xffffaffau, i0);
    const uint32_t high = permute_bytes(0, 0x14414444u, i1) & permute_bytes(0, 0xaffaffffu, i0);
    CUTLASS_PRAGMA_UNROLL
    for (int t = 0; t < 4; ++t) {
      const uint32_t selector = permute_bytes(low, high, 0x40 + 0x11 * t);
      dense[0][t] = permute_bytes(y[t], 0, selector & 0xffff);
      dense[1][t] = permute_bytes(dh[t], 0, selector & 0xffff);
    }
  }
  // The lowest two bits of four bytes, a nibble each: what permute_bytes takes to look them up in its second word.
  CUTLASS_DEVICE static uint32_t indices(uint32_t w) {
    w = (w & 0x03030303u) | 0x04040404u;
    return permute_bytes(w + (w >> 4), 0, 0x4420);
  }

  // Along tokens: lane q of a quad has feature q of its four, 16 bytes of 32 tokens.
  CUTLASS_DEVICE void store_values(Lane const& at, int place, TokenParams const& to,
                                   uint32_t (&along)[kGroups][2]) const {
    CUTLASS_PRAGMA_UNROLL
    for (int j = 0; j < kGroups; ++j) transpose_halves_of_quad(along[j], at.q());
    uint8_t* values =
        static_cast<uint8_t*>(to.values) + int64_t(at.feature + 4 * at.g() + at.q()) * (p_.tokens / 2) + place / 2;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 2; ++i) {
      const uint32_t (&first)[2] = along[2 * i], (&second)[2] = along[2 * i + 1];
      store16_if(exists(at, place + 32 * i), values + 16 * i, first[0], first[1], second[0], second[1]);
    }
  }
  CUTLASS_DEVICE void store_meta(Lane const& at, int place, uint8_t* meta, uint32_t (&nibbles)[kGroups / 2]) const {
    CUTLASS_PRAGMA_UNROLL
    for (uint32_t& w : nibbles) w = split_nibbles(transpose_bytes_of_quad(w, at.q()));
    // With its padding: blocks of 128 tokens and 128 features. Orders of tiles have some that lie beyond.
    const int m_meta = int(round_up(p_.features, kMetaRowPadding)), feature = at.feature + 4 * at.g() + at.q();
    if (place / 128 * 128 >= p_.tokens || feature >= m_meta) return;
    uint8_t* to = meta + (int64_t(place / 128) * m_meta + feature) * 16 + place % 128 / 8;
    *reinterpret_cast<uint2*>(to) = make_uint2(nibbles[0], nibbles[1]);
  }

  // Features that are kept whole: four tokens each, from a place on.
  CUTLASS_DEVICE void store_hot(int place, int4 slots, uint32_t const (&dense)[2][4]) const {
    const int of[4] = {slots.x, slots.y, slots.z, slots.w};
    CUTLASS_PRAGMA_UNROLL
    for (int c = 0; c < 4; ++c) {
      if (of[c] < 0) continue;
      CUTLASS_PRAGMA_UNROLL
      for (int which = 0; which < 2; ++which) {
        uint32_t const(&tokens)[4] = dense[which];
        const uint32_t first = permute_bytes(tokens[0], tokens[1], 0x40 + 0x11 * c);
        const uint32_t second = permute_bytes(tokens[2], tokens[3], 0x40 + 0x11 * c);
        *reinterpret_cast<uint32_t*>(p_.hot[which] + int64_t(of[c]) * p_.tokens + place) =
            permute_bytes(first, second, 0x5410);
      }
    }
  }
};

}  // namespace sparse24::cuda
