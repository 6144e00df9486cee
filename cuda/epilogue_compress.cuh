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

#include "epilogue_base.cuh"
#include "select24.cuh"
#include "sparse24/format.h"

namespace sparse24::cuda {

// Arguments as the device sees them.
struct CompressParams {
  Operand a;  // the stored form of the result
  void* values;
  uint8_t* meta;
  const float* scale_x;  // null: 1
  const float* scale_w;
  const void* bias;        // null: 0; of the pre-activation's type
  const float* scale_out;  // fp8 values; one element or one per row
  float* amax;             // null, or where the largest activated value is collected
  int scale_x_stride;      // 0: one element, 1: one per row
  int scale_w_stride;
  int scale_out_stride;
};

// T: type the pre-activation is rounded to. kFp8: type of the values; otherwise T.
template <class T, bool kFp8, Activation kAct>
class CompressEpilogue : public EpilogueBase<CompressParams> {
 public:
  using EpilogueBase<CompressParams>::EpilogueBase;

  template <class Problem, class BlockShape, class BlockCoord, class Engine, class Layout, class TiledMma,
            class Residue>
  CUTLASS_DEVICE void operator()(Problem const&, BlockShape const& block_shape, BlockCoord const& block_coord,
                                 cute::Tensor<Engine, Layout> const& acc, TiledMma tiled_mma, Residue const&,
                                 int thread_idx, char*) {
    using namespace cute;
    const auto coords = tiled_mma.get_slice(thread_idx).partition_C(make_identity_tensor(take<0, 2>(block_shape)));
    const int m_tile = get<0>(block_coord) * size<0>(block_shape);
    const int n_tile = get<1>(block_coord) * size<1>(block_shape);
    constexpr int kBlocks = decltype(size<0, 2>(acc))::value;
    static_assert(kBlocks % kStep == 0, "a step's columns lie in one MMA");
    static_assert(decltype(size<0>(block_shape))::value % kMetaRowPadding == 0, "tiles cover the metadata's padding");

    const int q = threadIdx.x & 3;
    float amax = 0.f;
    CUTLASS_PRAGMA_UNROLL
    for (int mi = 0; mi < size<1>(acc); ++mi) {
      const int m = m_tile + get<0>(coords(make_coord(_0{}, _0{}, _0{}), mi, _0{}));  // row r of this lane
      const Row row = row_of(m, q);
      CUTLASS_PRAGMA_UNROLL
      for (int ni = 0; ni < size<2>(acc); ++ni) {
        CUTLASS_PRAGMA_UNROLL
        for (int step = 0; step < kBlocks; step += kStep) {
          const int n = n_tile + get<1>(coords(make_coord(_0{}, _0{}, step), mi, ni)) - 2 * q;
          uint32_t kept[kStep], complements[kStep / 4] = {};
          CUTLASS_PRAGMA_UNROLL
          for (int b = 0; b < kStep; ++b) {
            const auto pair = [&](int half) {
              const int column = n + 8 * b + 2 * q;
              return pack2(T{}, finish(acc(make_coord(_0{}, half, step + b), mi, ni), row, half, column),
                           finish(acc(make_coord(_1{}, half, step + b), mi, ni), row, half, column + 1));
            };
            const uint32_t upper = pair(0), lower = pair(1);
            const uint32_t got = __shfl_xor_sync(0xffffffffu, q & 1 ? upper : lower, 1);
            const uint32_t left = q & 1 ? got : upper, right = q & 1 ? lower : got;
            const Group<T, kAct> group(left, right);
            if (p_.amax) amax = fmaxf(amax, fmaxf(fabsf(group.y(0)), fabsf(group.y(1))));  // the largest is kept
            kept[b] = kFp8 ? group.kept_e4m3(row.inverse_scale) : group.kept_16bit();
            complements[b / 4] += group.kept.complement << (8 * (b % 4) + 4 * (q >> 1));
          }
          store_values(kept, row.index, n, q);
          store_meta(complements, row.index, n, q);
        }
      }
    }
    if (p_.amax) collect(amax);
  }

 private:
  // Columns are finished 64 (fp8: 128) at a time, the K extent of a metadata atom.
  static constexpr int kStep = kFp8 ? 16 : 8;

  struct Row {
    bool valid[2];        // rows r and r + 8 exist
    float scale_x[2];     // of these rows
    int64_t index;        // the row this lane selects for: r or r + 8
    float inverse_scale;  // of that row
  };
  CUTLASS_DEVICE Row row_of(int m, int q) const {
    Row row{{m < p_.a.m, m + 8 < p_.a.m}, {1.f, 1.f}, m + 8 * (q & 1), 1.f};
    CUTLASS_PRAGMA_UNROLL
    for (int half = 0; half < 2; ++half) {
      if (p_.scale_x && row.valid[half]) row.scale_x[half] = p_.scale_x[(m + 8 * half) * p_.scale_x_stride];
    }
    if (kFp8 && row.index < p_.a.m) row.inverse_scale = __frcp_rn(p_.scale_out[row.index * p_.scale_out_stride]);
    return row;
  }

  // Outside of the matrix accumulators are zero, and stay so: the padding is a group of zeros.
  CUTLASS_DEVICE float finish(float acc, Row const& row, int half, int n) const {
    float v = acc * row.scale_x[half];
    if (p_.scale_w && n < p_.a.k) v *= p_.scale_w[n * p_.scale_w_stride];
    if (p_.bias && n < p_.a.k && row.valid[half]) v += float(static_cast<const T*>(p_.bias)[n]);
    return v;
  }

  // kept[b]: the kept pair of group 2b + (q >> 1). Lanes q and q ^ 2 share a row: after trading halves each holds the
  // neighbouring pairs of 16 bytes.
  CUTLASS_DEVICE void store_values(uint32_t const (&kept)[kStep], int64_t row, int n, int q) const {
    const bool high = q >> 1;
    constexpr int kPerStore = kFp8 ? 8 : 4;  // blocks of 8 columns whose values fill 2 x 16 bytes
    CUTLASS_PRAGMA_UNROLL
    for (int first = 0; first < kStep; first += kPerStore) {
      uint32_t w[4];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 2; ++i) {
        uint32_t mine[2];  // for the low and the high lane; fp8 pairs of two blocks share a word
        CUTLASS_PRAGMA_UNROLL
        for (int lane = 0; lane < 2; ++lane) {
          const int b = first + (kFp8 ? 4 * lane + 2 * i : 2 * lane + i);
          mine[lane] = kFp8 ? pack16(uint16_t(kept[b]), uint16_t(kept[b + 1])) : kept[b];
        }
        const uint32_t got = __shfl_xor_sync(0xffffffffu, high ? mine[0] : mine[1], 2);
        const uint32_t even = high ? got : mine[0], odd = high ? mine[1] : got;  // groups 2b, groups 2b + 1
        w[2 * i] = kFp8 ? __byte_perm(even, odd, 0x5410) : even;
        w[2 * i + 1] = kFp8 ? __byte_perm(even, odd, 0x7632) : odd;
      }
      constexpr int kColumns = kPerStore * 4;  // of one lane's 16 bytes
      const int column = n + 8 * first + kColumns * high;
      if (row < p_.a.m && column < p_.a.k) {
        const int64_t index = (row * p_.a.k + column) / 2;
        store16(static_cast<char*>(p_.values) + index * (kFp8 ? 1 : 2), w[0], w[1], w[2], w[3]);
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
    if constexpr (kFp8) {
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

  // Non-negative floats order like their bits; NaN was dropped by fmaxf.
  CUTLASS_DEVICE void collect(float amax) const {
    amax = warp_max(amax);
    if (threadIdx.x % 32 == 0) atomicMax(reinterpret_cast<int*>(p_.amax), __float_as_int(amax));
  }
};

}  // namespace sparse24::cuda
