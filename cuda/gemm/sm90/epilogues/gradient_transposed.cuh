// The epilogue of linear_gradient with a 2:4 weight, whose product is dy.T: rows of the tile are features, columns are
// tokens. It stores what epilogues/gradient.cuh does, dh along features and both y and dh along tokens.
//
// Rows and columns of the tile are in an order (mainloops/grouped_sparse.cuh) in which the fragment of a thread holds
// groups of four features and of four tokens whole, so that nothing is exchanged to select either way. Of columns
// 16 j .. 16 j + 15, lane 4 g + q of warp w holds
//
//     rows g, g + 8, g + 64, g + 72 (+ 16 w)              =  features 0 .. 3 of group 8 w + g
//     columns 2q, 2q + 1, 2q + 8, 2q + 9 (+ 16 j)         =  tokens 0 .. 3 of group 4 j + q
//
// What a token keeps is 4 bytes a group, which eight lanes make 32 of; along tokens four features are 8 bytes, which
// they make 64 of. Nibbles alone are exchanged, four of a lane with four of three others.
#pragma once

#include "gemm/sm90/epilogues/gradient.cuh"

namespace sparse24::cuda {

// The place 4 * group + feature of a row of the GEMM is place_of_row of gradient.cuh. That of a column, 4 * group +
// token:
SPARSE24_HD constexpr int place_of_column(int column) {
  return column / 16 * 16 + column % 8 / 2 * 4 + column % 16 / 8 * 2 + column % 2;
}

// Of four lanes kStride apart, lane i has nibble k of both halves of w; afterwards nibble k is what was lane k's nibble
// i: a 4 x 4 transpose of each half.
template <int kStride>
__device__ __forceinline__ uint32_t transpose_nibbles(uint32_t w, int i) {
  uint32_t got = __shfl_xor_sync(0xffffffffu, w, 2 * kStride);
  w = i & 2 ? permute_bytes(w, got, 0x3715) : permute_bytes(w, got, 0x6240);
  got = __shfl_xor_sync(0xffffffffu, w, kStride);
  const uint32_t first = i & 1 ? got >> 4 : w, second = i & 1 ? w : got << 4;
  return (first & 0x0f0f0f0fu) | (second & 0xf0f0f0f0u);
}

// dy of 64 tokens of a tile, of a lane's groups of four: features 0 and 1, and 2 and 3, of each token.
struct TransposedPart {
  static constexpr int kTokens = 64, kGroups = 4;
  uint32_t of[kGroups][4][2];
};

// Rounds the accumulators of a part to T.
template <class T, class Accumulators>
CUTLASS_DEVICE void round_part(Accumulators const& acc, int part, TransposedPart& out) {
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < 32; ++i) {
    const int j = i / 8 % 4, t = i / 2 % 4, pair = i % 2;
    const auto of = [&](int e) { return acc(cute::make_coord(t % 2, e, 8 * part + 2 * j + t / 2), pair, 0); };
    out.of[j][t][pair] = pack2(T{}, of(0), of(1));
  }
  compiler_fence();
}

// All values and the metadata of y are of the 16-bit type T. Tokens come in multiples of kGroupedTokens, features of
// kGroupedFeatures: whole warps have a feature, and all lanes have tokens of 16, or none has.
template <class T, int kTileM, int kTileN>
class TransposedGradientEpilogue : public EpilogueBase<GradientParams<T>, NoStorage> {
  using Base = EpilogueBase<GradientParams<T>, NoStorage>;
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
    const Lane at{lane, int(get<0>(block_coord)) * kTileM + thread_idx / 32 * 32 + lane / 4 * 4};
    const int first_token = int(get<1>(block_coord)) * kTileN;
    // dy is rounded first, because the accumulators leave no registers for anything else: those of the first part, once
    // it is rounded, are room for the first loads.
    TransposedPart parts[kParts];
    round_part<T>(acc, 0, parts[0]);
    const int4 slots = load_slots(at);
    Forward next = load(at, first_token);
    CUTLASS_PRAGMA_UNROLL
    for (int part = 1; part < kParts; ++part) round_part<T>(acc, part, parts[part]);
    // A loop, with the next part moved to where the code expects it: unrolled, a tile would fill the instruction cache.
    CUTLASS_PRAGMA_NO_UNROLL
    for (int part = 0; part < kParts; ++part) {
      const int place = first_token + part * kPartTokens;
      Forward y = next;
      // On its way while this part is computed.
      if (part + 1 < kParts) next = load(at, place + kPartTokens);
      visit(at, place, parts[0], y, slots);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 1; i < kParts; ++i) parts[i - 1] = parts[i];
    }
  }

 private:
  static constexpr int kPartTokens = TransposedPart::kTokens, kGroups = TransposedPart::kGroups;
  static constexpr int kParts = kTileN / kPartTokens;

  // A lane, and the first of its four features.
  struct Lane {
    int lane, feature;
    CUTLASS_DEVICE int q() const { return lane & 3; }
    CUTLASS_DEVICE int g() const { return lane >> 2; }
  };
  // What a lane loads: the kept pairs of its groups; of token g % 4 of each group the nibbles of 16 features.
  struct Forward {
    uint32_t pairs[kGroups][4];
    uint32_t meta[kGroups];
  };

  // Whether the 16 tokens from a place on exist, and the features of this warp.
  CUTLASS_DEVICE bool exists(Lane const& at, int place) const { return place < p_.tokens && at.feature < p_.features; }
  // Token t of a lane's group of the 16 tokens from a place on.
  CUTLASS_DEVICE int token(Lane const& at, int place, int t) const {
    const int group = place / 4 + at.q();
    return p_.quarter ? t * p_.quarter + group : 4 * group + t;
  }
  CUTLASS_DEVICE int64_t value_offset(Lane const& at, int token) const {
    return int64_t(token) * (p_.features / 2) + at.feature / 2;
  }

  // Zeros that keep (0, 1) where there is nothing. Not load16: the kernel may have started while the one before it was
  // writing these, which are therefore not read-only.
  CUTLASS_DEVICE Forward load(Lane const& at, int place) const {
    Forward out{{}, {0x4444u, 0x4444u, 0x4444u, 0x4444u}};
    const int64_t m_meta = round_up(p_.tokens, kMetaRowPadding);
    const uint8_t* column =
        p_.meta + at.feature / 64 * m_meta * 8 + at.feature % 32 / 16 * 64 + at.feature % 64 / 32 * 4;
    CUTLASS_PRAGMA_UNROLL
    for (int j = 0; j < kGroups; ++j) {
      if (!exists(at, place + 16 * j)) continue;
      const int t = token(at, place + 16 * j, at.g() & 3);
      // As they are: an instruction on them would wait for them.
      out.meta[j] = *reinterpret_cast<const uint16_t*>(column + int64_t(t / 16) * 128 + t % 8 * 8 + t % 16 / 8 * 2);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 4; ++i) {
        const T* y = static_cast<const T*>(p_.y) + value_offset(at, token(at, place + 16 * j, i));
        out.pairs[j][i] = *reinterpret_cast<const uint32_t*>(y);
      }
    }
    return out;
  }

  CUTLASS_DEVICE int4 load_slots(Lane const& at) const {
    int4 slots{-1, -1, -1, -1};
    if (p_.slots && at.feature < p_.features) slots = *reinterpret_cast<const int4*>(p_.slots + at.feature);
    return slots;
  }

  // Computes and stores everything of 64 tokens.
  CUTLASS_DEVICE void visit(Lane const& at, int place, TransposedPart const& dy, Forward const& y, int4 slots) const {
    const bool hot = (slots.x & slots.y & slots.z & slots.w) >= 0;
    uint32_t of_two = 0;          // groups, the nibbles of y
    uint32_t nibbles[2][2] = {};  // of y and of dh, of features 0 and 1, and 2 and 3: group j has nibble j of a half
    CUTLASS_PRAGMA_UNROLL
    for (int j = 0; j < kGroups; ++j) {
      const int first = place + 16 * j;
      const bool there = exists(at, first);
      if (j % 2 == 0) of_two = transpose_nibbles<4>(y.meta[j] | y.meta[j + 1] << 16, at.g() & 3);
      const Pattern pattern = pattern_of(of_two >> 16 * (j % 2));
      uint32_t dh[4];
      CUTLASS_PRAGMA_UNROLL
      for (int t = 0; t < 4; ++t) dh[t] = there ? pattern.kept(t, dy.of[j][t][0], dy.of[j][t][1]) : 0u;
      p_.derivative.apply(dh, y.pairs[j]);
      if (there) store(at, first, dh);
      if (!p_.along_tokens[0].values) continue;
      uint32_t dense[2][2][4];  // of y and of dh: features 0 and 1, and 2 and 3, of the tokens
      CUTLASS_PRAGMA_UNROLL
      for (int t = 0; t < 4; ++t) {
        const uint32_t of_y = p_.derivative.roots() ? square2<T>(y.pairs[j][t]) : y.pairs[j][t];
        pattern.spread(t, of_y, dense[0][0][t], dense[0][1][t]);
        pattern.spread(t, dh[t], dense[1][0][t], dense[1][1][t]);
      }
      if (hot && there) store_hot(at, first, slots, dense);
      CUTLASS_PRAGMA_UNROLL
      for (int which = 0; which < 2; ++which) {
        const KeptPairs kept[2] = {keep(dense[which][0]), keep(dense[which][1])};
        if (there) store_values(at, first, p_.along_tokens[which], kept);
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 2; ++i) nibbles[which][i] |= kept[i].nibbles & 0x000f000fu << 4 * j;
      }
    }
    if (!p_.along_tokens[0].values) return;
    CUTLASS_PRAGMA_UNROLL
    for (int which = 0; which < 2; ++which) store_meta(at, place, p_.along_tokens[which].meta, nibbles[which]);
  }

  // The nibbles of four tokens, one a byte.
  CUTLASS_DEVICE static Pattern pattern_of(uint32_t nibbles) {
    const uint32_t twice = permute_bytes(nibbles, 0, 0x1100);
    return {{(twice & 0x000f000fu) | (twice >> 4 & 0x0f000f00u), 0}};
  }

  // The kept values of dh where `load` found those of y.
  CUTLASS_DEVICE void store(Lane const& at, int place, uint32_t const (&dh)[4]) const {
    CUTLASS_PRAGMA_UNROLL
    for (int t = 0; t < 4; ++t) {
      T* values = static_cast<T*>(p_.dh) + value_offset(at, token(at, place, t));
      *reinterpret_cast<uint32_t*>(values) = dh[t];
    }
  }

  CUTLASS_DEVICE static KeptPairs keep(const uint32_t (&v)[4]) {
    uint32_t m[4];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 4; ++i) m[i] = ElementwiseActivation<T, Activation::kNone>::magnitudes(v[i]);
    return keep_two_pairs(m, v);
  }

  // Rows 2 group and 2 group + 1 of the values along tokens.
  CUTLASS_DEVICE void store_values(Lane const& at, int place, TokenParams const& to, KeptPairs const (&kept)[2]) const {
    T* values = static_cast<T*>(to.values) + int64_t(2 * (place / 4 + at.q())) * p_.features + at.feature;
    *reinterpret_cast<uint2*>(values) = make_uint2(kept[0].first, kept[1].first);
    *reinterpret_cast<uint2*>(values + p_.features) = make_uint2(kept[0].second, kept[1].second);
  }

  // Nibbles of 64 tokens: lanes of a quad trade them, so that lane q has all of 16 tokens, k_q where format.h draws
  // them; then lanes with rows f and f + 8 of 16, which are neighbours there.
  CUTLASS_DEVICE void store_meta(Lane const& at, int place, uint8_t* meta, uint32_t (&nibbles)[2]) const {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 2; ++i) nibbles[i] = transpose_nibbles<1>(nibbles[i], at.q());
    const int high = at.g() >> 1 & 1;
    transpose_pair<8>(nibbles[0], nibbles[1], high);
    // Its padding is stored too, to blocks of 64 tokens and 128 features. Orders of tiles with a swizzle have tiles
    // that lie beyond it.
    const int m_meta = int(round_up(p_.features, kMetaRowPadding)), feature = at.feature - 8 * high + 2 * high;
    if (place >= p_.tokens || at.feature >= m_meta) return;
    uint8_t* of_row = meta + (int64_t(place / 64) * (m_meta / 16) + feature / 16) * 128 + feature % 8 * 8 +
                      (at.q() & 1) * 64 + (at.q() >> 1) * 4;
    *reinterpret_cast<uint32_t*>(of_row) = __byte_perm(nibbles[0], nibbles[1], 0x5410);
    *reinterpret_cast<uint32_t*>(of_row + 8) = __byte_perm(nibbles[0], nibbles[1], 0x7632);
  }

  // Features that are kept whole.
  CUTLASS_DEVICE void store_hot(Lane const& at, int place, int4 slots, uint32_t const (&dense)[2][2][4]) const {
    const int of[4] = {slots.x, slots.y, slots.z, slots.w};
    CUTLASS_PRAGMA_UNROLL
    for (int c = 0; c < 4; ++c) {
      if (of[c] < 0) continue;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 8; ++i) {
        const int which = i / 4, t = i % 4;
        static_cast<uint16_t*>(p_.hot[which])[int64_t(of[c]) * p_.tokens + token(at, place, t)] =
            uint16_t(dense[which][c / 2][t] >> 16 * (c % 2));
      }
    }
  }
};

}  // namespace sparse24::cuda
