// The epilogue of linear_compress: activation, two of four and metadata, straight from the accumulators.
//
// A warpgroup's fragment holds, per block of 8 columns, for lane = 4 r + q (PTX ISA, wgmma D fragments):
//
//     row r      columns 2q, 2q + 1
//     row r + 8  columns 2q, 2q + 1
//
// so that lanes (0, 1) and (2, 3) of a quad share a group of four columns of both rows. One exchange of rounded
// pre-activations gives each lane one whole group: even lanes that of row r, odd lanes that of row r + 8, q / 2 saying
// which half of the block. Everything after that is local to the lane, or between it and one neighbour:
//
//     lane q of a quad     row              groups of block j
//     0, 2                 r                2j, 2j + 1
//     1, 3                 r + 8            2j, 2j + 1
//
// Rounding and selection are those of compress.cu, by the same code: results are bit-identical to the two steps.
#pragma once

#include "epilogue_hidden.cuh"
#include "select24.cuh"
#include "sparse24/format.h"

namespace sparse24::cuda {

// Arguments as the device sees them.
struct CompressParams {
  HiddenParams hidden;
  Operand a;  // the stored form of the result, metadata included
  void* values;
  uint8_t* meta;
};

// T: the type that h is rounded to. kFp8Values: of the values; otherwise T. kFp8Meta: the layout of the metadata.
template <class T, bool kFp8Values, bool kFp8Meta, int kTileM, int kTileN>
class CompressEpilogue : public EpilogueBase<CompressParams, TermsStages<TileTerms<kTileM, kTileN>>> {
  using Base = EpilogueBase<CompressParams, TermsStages<TileTerms<kTileM, kTileN>>>;
  using Base::p_;

 public:
  using Base::Base;
  using Terms = TileTerms<kTileM, kTileN>;

  template <class Problem, class BlockShape, class BlockCoord>
  CUTLASS_DEVICE void fetch(int lane, Problem const&, BlockShape const&, BlockCoord const& block_coord,
                            Terms& terms) const {
    using namespace cute;
    p_.hidden.template fetch<T>(lane, get<0>(block_coord) * kTileM, get<1>(block_coord) * kTileN, terms);
  }

  template <class Problem, class BlockShape, class BlockCoord, class Engine, class Layout, class TiledMma>
  CUTLASS_DEVICE void operator()(Problem const&, BlockShape const& block_shape, BlockCoord const& block_coord,
                                 cute::Tensor<Engine, Layout> const& acc, TiledMma tiled_mma, int thread_idx,
                                 Terms const& terms) const {
    using namespace cute;
    static_assert(kTileM % kMetaRowPadding == 0, "tiles cover the metadata's padding");
    static_assert(is_same_v<decltype(take<0, 2>(block_shape)), Shape<Int<kTileM>, Int<kTileN>>>, "terms of this tile");
    const auto coords = tiled_mma.get_slice(thread_idx).partition_C(make_identity_tensor(take<0, 2>(block_shape)));
    const int m_tile = get<0>(block_coord) * kTileM, n_tile = get<1>(block_coord) * kTileN;
    // One decision for the whole tile: the loops below are too long to decide in.
    if (p_.hidden.amax || p_.hidden.saturated) {
      compress<true>(m_tile, n_tile, acc, coords, terms);
    } else {
      compress<false>(m_tile, n_tile, acc, coords, terms);
    }
  }

 private:
  template <bool kStatistics, class Acc, class Coords>
  CUTLASS_DEVICE void compress(int m_tile, int n_tile, Acc const& acc, Coords const& coords, Terms const& terms) const {
    using namespace cute;
    const HiddenParams& hidden = p_.hidden;
    constexpr int kBlocks = decltype(size<0, 2>(acc))::value;
    constexpr int kRows = decltype(size<1>(acc))::value;
    static_assert(kBlocks % kStep == 0, "a step's columns lie in one MMA");

    const int q = threadIdx.x & 3;
    HiddenStatistics seen;
    CUTLASS_PRAGMA_UNROLL
    for (int mi = 0; mi < kRows; ++mi) {
      const int r = get<0>(coords(make_coord(_0{}, _0{}, _0{}), mi, _0{})), m = m_tile + r;  // the other is r + 8
      const float scale_x[2] = {terms.rows[r].scale, terms.rows[r + 8].scale};
      const float inverse_scale = kFp8Values ? terms.rows[r + 8 * (q & 1)].out_scale : 0.f;
      const bool valid[2] = {m < hidden.rows, m + 8 < hidden.rows};
      const int64_t row = m + 8 * (q & 1);  // the one this lane selects for
      CUTLASS_PRAGMA_UNROLL
      for (int ni = 0; ni < size<2>(acc); ++ni) {
        CUTLASS_PRAGMA_UNROLL
        for (int step = 0; step < kBlocks; step += kStep) {
          const int column = get<1>(coords(make_coord(_0{}, _0{}, step), mi, ni));  // of this lane, in the tile
          const int n = n_tile + column - 2 * q;
          uint32_t kept[kStep], complements[kStep / 4] = {};
          CUTLASS_PRAGMA_UNROLL
          for (int b = 0; b < kStep; ++b) {
            if (b % 8 == 0) asm volatile("" ::: "memory");  // keeps the reads of later columns out: registers
            // Rows beyond the last are zeros, whatever w holds: NaN times their zero is none of theirs.
            const auto of_columns = terms.columns[column / 2 + 4 * b];
            const auto pair = [&](int half) {
              const float h0 = acc(make_coord(_0{}, half, step + b), mi, ni) * scale_x[half] * of_columns.scale[0];
              const float h1 = acc(make_coord(_1{}, half, step + b), mi, ni) * scale_x[half] * of_columns.scale[1];
              return valid[half] ? pack2(T{}, h0 + of_columns.shift[0], h1 + of_columns.shift[1]) : 0u;
            };
            const uint32_t upper = pair(0), lower = pair(1);
            const uint32_t got = __shfl_xor_sync(0xffffffffu, q & 1 ? upper : lower, 1);
            const Group<T, Activation::kRelu2> group(q & 1 ? got : upper, q & 1 ? lower : got);
            if constexpr (kStatistics) {  // the largest of a group is always kept
              seen.see(group.y(0), inverse_scale);
              seen.see(group.y(1), inverse_scale);
            }
            kept[b] = kFp8Values ? group.kept_e4m3(inverse_scale) : group.kept_16bit();
            complements[b / 4] += group.kept.complement << (8 * (b % 4) + 4 * (q >> 1));
          }
          store_values(kept, row, n, q);
          store_meta(complements, row, n, q);
        }
      }
    }
    if constexpr (kStatistics) seen.collect(hidden);
  }

  // Columns are finished 64 (fp8 metadata: 128) at a time, the K extent of a metadata atom.
  static constexpr int kStep = kFp8Meta ? 16 : 8;

  // kept[b]: the kept pair of group 2b + (q >> 1). Lanes q and q ^ 2 share a row: after trading halves each holds the
  // neighbouring pairs of 16 bytes.
  CUTLASS_DEVICE void store_values(uint32_t const (&kept)[kStep], int64_t row, int n, int q) const {
    const bool high = q >> 1;
    constexpr int kPerStore = kFp8Values ? 8 : 4;  // blocks of 8 columns whose values fill 2 x 16 bytes
    CUTLASS_PRAGMA_UNROLL
    for (int first = 0; first < kStep; first += kPerStore) {
      uint32_t w[4];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 2; ++i) {
        uint32_t mine[2];  // for the low and the high lane; fp8 pairs of two blocks share a word
        CUTLASS_PRAGMA_UNROLL
        for (int lane = 0; lane < 2; ++lane) {
          const int b = first + (kFp8Values ? 4 * lane + 2 * i : 2 * lane + i);
          mine[lane] = kFp8Values ? pack16(uint16_t(kept[b]), uint16_t(kept[b + 1])) : kept[b];
        }
        const uint32_t got = __shfl_xor_sync(0xffffffffu, high ? mine[0] : mine[1], 2);
        const uint32_t even = high ? got : mine[0], odd = high ? mine[1] : got;  // groups 2b, groups 2b + 1
        w[2 * i] = kFp8Values ? __byte_perm(even, odd, 0x5410) : even;
        w[2 * i + 1] = kFp8Values ? __byte_perm(even, odd, 0x7632) : odd;
      }
      constexpr int kColumns = kPerStore * 4;  // of one lane's 16 bytes
      const int column = n + 8 * first + kColumns * high;
      if (row < p_.a.m && column < p_.a.k) {
        const int64_t index = (row * p_.a.k + column) / 2;
        store16(static_cast<char*>(p_.values) + index * (kFp8Values ? 1 : 2), w[0], w[1], w[2], w[3]);
      }
    }
  }

  // complements[i]: 15 - nibble of 32 columns, this lane's half of each block; lanes q and q ^ 2 complete each other.
  CUTLASS_DEVICE void store_meta(uint32_t const (&complements)[kStep / 4], int64_t row, int n, int q) const {
    uint32_t nibbles[kStep / 4];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kStep / 4; ++i)
      nibbles[i] = ~(complements[i] | __shfl_xor_sync(0xffffffffu, complements[i], 2));
    const bool covered = row < p_.a.m_meta && n < p_.a.k_meta && q < 2;
    if constexpr (kFp8Meta) {
      if (covered)
        store16(p_.meta + (n / 128 * p_.a.m_meta + row) * 16, nibbles[0], nibbles[1], nibbles[2], nibbles[3]);
    } else {
      // Even lanes store k0 and k2 of both rows, odd lanes k1 and k3: 8 of the 128 bytes that format.h draws.
      const bool odd = q & 1;
      const uint32_t low = __byte_perm(nibbles[0], nibbles[1], 0x5410),
                     high = __byte_perm(nibbles[0], nibbles[1], 0x7632);
      const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? low : high, 1);
      const uint32_t upper = odd ? got : low, lower = odd ? high : got;  // of rows r and r + 8
      if (covered) {
        const int64_t byte = n / 64 * p_.a.m_meta * 8 + row / 16 * 128 + odd * 64 + row % 8 * 8;
        *reinterpret_cast<uint2*>(p_.meta + byte) =
            make_uint2(__byte_perm(upper, lower, 0x5410), __byte_perm(upper, lower, 0x7632));
      }
    }
  }
};

}  // namespace sparse24::cuda
