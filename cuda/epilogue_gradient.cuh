// The epilogue of linear_gradient: dh = dy * 2 sqrt(y) at the entries that the forward pass kept, straight from the
// accumulators, and both y and dh once more with two of four along tokens.
//
// The fragment and its exchange are those of epilogue_compress.cuh, but nothing is selected: the forward's metadata
// says what is kept. Values are read as that epilogue stores them, by the same lanes, so that every exchange runs
// backwards.
//
// Rows of the tile are tokens, in their own order or interleaved: groups of four rows are then tokens a quarter apart.
// What is stored along features keeps the order of the forward pass; what is stored along tokens has that of the rows.
#pragma once

#include "epilogue_base.cuh"
#include "epilogue_tokens.cuh"
#include "sparse24/linear_gradient.h"

namespace sparse24::cuda {

// Arguments as the device sees them.
struct GradientParams {
  int tokens, features;
  const void* y;        // kept values
  const uint8_t* meta;  // theirs and those of dh
  void* dh;
  TokenParams along_tokens[2];  // y and dh; null, counts too: not wanted
  int32_t* counts;
  int quarter;  // of the tokens; 0: not interleaved
};

// T: the 16-bit type. kFp8Meta: the layout of the metadata of y; along tokens it is that of T.
template <class T, bool kFp8Meta, int kTileM, int kTileN>
class GradientEpilogue : public EpilogueBase<GradientParams, NoStorage> {
  using Base = EpilogueBase<GradientParams, NoStorage>;
  using Base::p_;

 public:
  using Base::Base;

  template <class Problem, class BlockShape, class BlockCoord, class Engine, class Layout, class TiledMma,
            class Residue>
  CUTLASS_DEVICE void operator()(Problem const&, BlockShape const& block_shape, BlockCoord const& block_coord,
                                 cute::Tensor<Engine, Layout> const& acc, TiledMma const&, Residue const&,
                                 int thread_idx, char*) const {
    using namespace cute;
    static_assert(kTileM % kMetaRowPadding == 0 && kTileN % kMetaRowPadding == 0, "tiles cover the metadata's padding");
    static_assert(is_same_v<decltype(take<0, 2>(block_shape)), Shape<Int<kTileM>, Int<kTileN>>>, "this tile");
    constexpr int kBlocks = decltype(size<0, 2>(acc))::value;  // of 8 columns
    constexpr int kRows = decltype(size<1>(acc))::value;
    constexpr int kParts = kBlocks / kStep * kRows;
    static_assert(kBlocks % kStep == 0 && decltype(size<2>(acc))::value == 1, "one MMA spans the columns");
    static_assert(decltype(size(TiledMma{}))::value == 128, "one warpgroup owns the tile, 64 rows at a time");
    constexpr int kSteps = kBlocks / kStep, kPart = 4 * kStep;
    const int lane = threadIdx.x & 31, q = lane & 3;
    const int m = get<0>(block_coord) * kTileM + thread_idx / 32 * 16, n = get<1>(block_coord) * kTileN;
    // Parts of 16 rows x 64 columns per warp, those of the same rows after each other, as their accumulators are.
    const auto first_row = [&](int part) { return m + part / kSteps * 64; };
    const auto feature = [&](int part) { return n + part % kSteps * 64; };
    float of_parts[kParts * kPart];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kParts * kPart; ++i) of_parts[i] = acc(i);

    Forward next = load(first_row(0), feature(0), lane);
    // A loop, with the accumulators of the next part moved to where the code expects them: unrolled, a tile's 7,000
    // instructions fill the instruction cache.
    CUTLASS_PRAGMA_NO_UNROLL
    for (int part = 0; part < kParts; ++part) {
      const int r = first_row(part), f = feature(part);
      uint32_t dy01[kStep], dy23[kStep];
      CUTLASS_PRAGMA_UNROLL
      for (int b = 0; b < kStep; ++b) {
        dy01[b] = pack2(T{}, of_parts[4 * b], of_parts[4 * b + 1]);
        dy23[b] = pack2(T{}, of_parts[4 * b + 2], of_parts[4 * b + 3]);
        transpose_pair<1>(dy01[b], dy23[b], q & 1);  // four columns of this lane's row
      }
      KeptFeatures kept[2];
      KeptFeatures &y = kept[0], &dh = kept[1];
      y = next.arranged(q, interleaved_token(row(r, lane), p_.quarter) & 8);
      dh = y;
      CUTLASS_PRAGMA_UNROLL
      for (int b = 0; b < kStep; ++b) {
        // Bytes 2 i0, 2 i0 + 1, 2 i1, 2 i1 + 1 of the four.
        const uint32_t nibble = y.nibble(b, q >> 1);
        const uint32_t selector = 0x1010u + (nibble & 3) * 0x22u + (nibble >> 2) * 0x2200u;
        // Beyond the last row and column y is zero, and dy whatever was multiplied: NaN times their zero is none of
        // theirs.
        const bool valid = row(r, lane) < p_.tokens && f + 8 * b < p_.features;
        dh.pairs[b] = times_root<T>(valid ? permute_bytes(dy01[b], dy23[b], selector) : 0u, y.pairs[b]);
      }
      // On its way while this part is stored; any earlier it would share the registers with this part's accumulators.
      if (part + 1 < kParts) next = load(first_row(part + 1), feature(part + 1), lane);
      store(dh, r, f, lane);
      if (p_.counts) {
        NonZeros nonzeros;
        store_tokens<T>(p_.along_tokens, {p_.tokens, p_.features, r, f}, kept, nonzeros);
        nonzeros.collect(p_.counts, f, p_.features);
      }
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < (kParts - 1) * kPart; ++i) of_parts[i] = of_parts[i + kPart];
    }
  }

 private:
  static constexpr int kStep = 8;  // blocks of one metadata atom

  // The row that a lane finishes, of 16 from `first` on.
  CUTLASS_DEVICE static int row(int first, int lane) { return first + lane / 4 + 8 * (lane & 1); }

  // Of the first kept value of an even group of a token.
  CUTLASS_DEVICE int64_t index(int64_t token, int column) const { return token * (p_.features / 2) + column / 2; }

  // What a lane loads of 16 rows x 64 columns: 16 neighbouring columns of its row, twice, and the metadata of all 64.
  struct Forward {
    uint4 values[2];
    uint2 meta[2];  // as they lie in memory: to arrange them is to wait for them

    // The exchange of the forward's stores, its own inverse.
    // `lower`: the token is one of the second eight of its 16.
    CUTLASS_DEVICE KeptFeatures arranged(int q, bool lower) const {
      KeptFeatures kept;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 2; ++i) {
        const uint32_t w[4] = {values[i].x, values[i].y, values[i].z, values[i].w};
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < 2; ++j) {
          uint32_t &low = kept.pairs[4 * i + j], &high = kept.pairs[4 * i + j + 2];
          low = w[2 * j];
          high = w[2 * j + 1];
          transpose_pair<2>(low, high, q >> 1);
        }
      }
      if constexpr (kFp8Meta) {
        kept.nibbles[0] = meta[0].x;
        kept.nibbles[1] = meta[0].y;
      } else {
        // k0 and k2 of both tokens, then k1 and k3.
        const uint32_t selector = lower ? 0x7632 : 0x5410;
        kept.nibbles[0] = permute_bytes(meta[0].x, meta[1].x, selector);
        kept.nibbles[1] = permute_bytes(meta[0].y, meta[1].y, selector);
      }
      return kept;
    }
  };

  // Zeros that keep (0, 1) beyond the last row and column. Not load16: the kernel may have started while the one before
  // it was writing these, so they are not read-only to it.
  CUTLASS_DEVICE Forward load(int first, int feature, int lane) const {
    constexpr uint2 kFirstTwo{0x44444444u, 0x44444444u};
    Forward out{{}, {kFirstTwo, kFirstTwo}};
    if (row(first, lane) >= p_.tokens || feature >= p_.features) return out;
    const int64_t t = interleaved_token(row(first, lane), p_.quarter);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int column = feature + 32 * i + 16 * (lane >> 1 & 1);
      if (column < p_.features)
        out.values[i] = *reinterpret_cast<const uint4*>(static_cast<const T*>(p_.y) + index(t, column));
    }
    const int64_t m_meta = round_up(p_.tokens, kMetaRowPadding);
    if constexpr (kFp8Meta) {
      // Half of the 16 bytes of 128 columns, in their order.
      const auto* of_token = p_.meta + (feature / 128 * m_meta + t) * 16 + feature % 128 / 8;
      out.meta[0] = *reinterpret_cast<const uint2*>(of_token);
    } else {
      // Two bytes for each 16 columns k0 .. k3, where format.h draws them, and those of the token eight further.
      const int64_t chunk = feature / 64 * (m_meta / 16) + t / 16;
      const auto* of_tokens = p_.meta + chunk * 128 + t % 8 * 8;
      out.meta[0] = *reinterpret_cast<const uint2*>(of_tokens);
      out.meta[1] = *reinterpret_cast<const uint2*>(of_tokens + 64);
    }
    return out;
  }

  // The kept values of dh, where `load` found those of y.
  CUTLASS_DEVICE void store(KeptFeatures const& dh, int first, int feature, int lane) const {
    const bool high = lane >> 1 & 1;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 2; ++i) {
      uint32_t w[4];
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < 2; ++j) {
        w[2 * j] = dh.pairs[4 * i + j];
        w[2 * j + 1] = dh.pairs[4 * i + j + 2];
        transpose_pair<2>(w[2 * j], w[2 * j + 1], high);
      }
      const int column = feature + 32 * i + 16 * high, r = row(first, lane);
      if (r < p_.tokens && column < p_.features)
        store16(static_cast<T*>(p_.dh) + index(interleaved_token(r, p_.quarter), column), w[0], w[1], w[2], w[3]);
    }
  }
};

}  // namespace sparse24::cuda
