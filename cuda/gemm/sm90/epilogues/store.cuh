// The epilogue of mm: D = scale_a * scale_b * acc + bias, straight from the accumulators to global memory.
//
// One class serves every output type and both majors at run time, so that kernels are instantiated per operand layout
// and tile only.
//
// Four blocks of the fragment (epilogues/base.cuh draws it) are transposed over the four lanes of a quad, so that each
// lane owns 8 neighbouring columns of one block, and stores 16 bytes at once. Where B is K-major its rows come in an
// order that gives lanes those (epilogues/permuted_n.cuh). For D.T, movmatrix first turns each 8 x 8 block, so that
// lanes own neighbouring rows instead; then two lanes trade halves, so that together they store the 16 rows of one
// column, a sector of 32 bytes.
#pragma once

#include "common/packed.cuh"
#include "common/warp.cuh"
#include "gemm/sm90/epilogues/base.cuh"
#include "gemm/sm90/epilogues/operands.cuh"
#include "gemm/sm90/epilogues/permuted_n.cuh"
#include "sparse24/types.h"

namespace sparse24::cuda {

// The arguments as the device sees them.
struct StoreParams {
  void* d;
  int64_t ldd;  // batches follow each other as rows
  DType d_dtype;
  bool transposed;  // d is D.T
  bool vectorised;  // rows of d are 16-byte aligned and a multiple of 8 long; fp32: 8-byte aligned rows of an even
                    // length
  const float* scale_a;
  const float* scale_b;
  const void* bias;
  DType bias_dtype;    // d_dtype or kFloat32
  int scale_a_stride;  // 0: one element, 1: one per row
  int scale_b_stride;

  // Whether a K-major B is read in the permuted order, in which lanes hold what they store: that order serves rows of
  // 16 bits that are stored in vectors, and no others.
  __host__ __device__ bool permutes_n() const { return in_steps() && !transposed; }
  // Whether StoreSteps can store D, which takes rows of 16 bits, in vectors.
  __host__ __device__ bool in_steps() const { return vectorised && d_dtype != DType::kFloat32; }
};

namespace detail {

__device__ __forceinline__ float load(const void* from, DType dtype, int i) {
  switch (dtype) {
    case DType::kBFloat16: return float(static_cast<const __nv_bfloat16*>(from)[i]);
    case DType::kFloat16: return float(static_cast<const __half*>(from)[i]);
    default: return static_cast<const float*>(from)[i];
  }
}
__device__ __forceinline__ void convert(__nv_bfloat16& d, float v) { d = __float2bfloat16_rn(v); }
__device__ __forceinline__ void convert(__half& d, float v) { d = __float2half_rn(v); }
__device__ __forceinline__ void convert(float& d, float v) { d = v; }

}  // namespace detail

// Lets a lane of the warp that fetches bring its share of the operands of the tile at row m and column n of D [rows,
// cols]. Rows and columns beyond D are never stored: they get the operands of the last, so that no load leaves a
// buffer.
template <class ColumnOf, int kTileM, int kTileN>
__device__ __forceinline__ void fetch_store_operands(StoreParams const& p, int lane, int rows, int cols, int m, int n,
                                                     ColumnOf column_of, EpilogueOperands<kTileM, kTileN>& operands) {
  using Operands = EpilogueOperands<kTileM, kTileN>;
  const auto row = [&](int i) {
    typename Operands::Row out{1.f, 1.f};
    if (p.scale_a) out.scale = p.scale_a[min(m + i, rows - 1) * p.scale_a_stride];
    return out;
  };
  const auto columns = [&](int i) {
    typename Operands::Columns out{{1.f, 1.f}, {0.f, 0.f}};
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int column = min(n + column_of(i + c), cols - 1);
      if (p.scale_b) out.scale[c] = p.scale_b[column * p.scale_b_stride];
      if (p.bias) out.shift[c] = detail::load(p.bias, p.bias_dtype, column);
    }
    return out;
  };
  operands.fetch(lane, row, columns);
}

// Stores 16 rows x 32 columns of a warp, both halves of its fragment, as rows of D.T, where D [rows, cols] has 16 bits.
// Lane 4 r + q gets 8 rows of column r of block q. Neighbours r then share their two columns, so that one stores the
// first 8 rows of both and the other the last 8, together a sector. The lane's first element is at m, n.
__device__ __forceinline__ void store_columns(StoreParams const& p, uint32_t (&w)[2][4], int m, int n, int rows,
                                              int cols) {
  const int q = threadIdx.x & 3, r = (threadIdx.x & 31) >> 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int b = 0; b < 4; ++b) w[half][b] = transpose_8x8(w[half][b]);
    transpose_quad(w[half], q);
  }
#pragma unroll
  for (int b = 0; b < 4; ++b) transpose_pair<4>(w[0][b], w[1][b], r & 1);
  m += 8 * (r & 1) - r;
  n += 6 * q + (r & 6);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (m < rows && n + i < cols)
      store16(static_cast<uint16_t*>(p.d) + (n + i) * p.ldd + m, w[i][0], w[i][1], w[i][2], w[i][3]);
  }
}

// kPermutedN says that B is K-major, so that its rows come in the permuted order where that serves.
template <int kTileM, int kTileN, bool kPermutedN>
class StoreEpilogue : public EpilogueBase<StoreParams, OperandStages<EpilogueOperands<kTileM, kTileN>>> {
  using Base = EpilogueBase<StoreParams, OperandStages<EpilogueOperands<kTileM, kTileN>>>;
  using Base::p_;

 public:
  using Base::Base;
  using Operands = EpilogueOperands<kTileM, kTileN>;
  using Permutation = PermutedN<8>;

  // Returns the column of D that a column of the tile is.
  CUTLASS_HOST_DEVICE static int column_of(StoreParams const& p, int column) {
    return kPermutedN && p.permutes_n() ? Permutation::feature(column) : column;
  }

  template <class Problem, class BlockShape, class BlockCoord>
  CUTLASS_DEVICE void fetch(int lane, Problem const& problem, BlockShape const&, BlockCoord const& block_coord,
                            Operands& operands) const {
    using namespace cute;
    fetch_store_operands(
        p_, lane, get<0>(problem), get<1>(problem), get<0>(block_coord) * kTileM, get<1>(block_coord) * kTileN,
        [&](int column) { return column_of(p_, column); }, operands);
  }

  template <class Problem, class BlockShape, class BlockCoord, class Engine, class Layout, class TiledMma>
  CUTLASS_DEVICE void operator()(Problem const& problem, BlockShape const& block_shape, BlockCoord const& block_coord,
                                 cute::Tensor<Engine, Layout> const& acc, TiledMma tiled_mma, int thread_idx,
                                 Operands const& operands) const {
    using namespace cute;
    static_assert(is_same_v<decltype(take<0, 2>(block_shape)), Shape<Int<kTileM>, Int<kTileN>>>,
                  "operands of this tile");
    const auto coords = tiled_mma.get_slice(thread_idx).partition_C(make_identity_tensor(take<0, 2>(block_shape)));
    const Tile tile{static_cast<int>(get<0>(problem)), static_cast<int>(get<1>(problem)),
                    static_cast<int>(get<0>(block_coord) * size<0>(block_shape)),
                    static_cast<int>(get<1>(block_coord) * size<1>(block_shape)),
                    static_cast<int>(get<3>(block_coord) * get<0>(problem))};
    // The type is decided once for the whole tile, because the loops below are too long to decide in.
    switch (p_.d_dtype) {
      case DType::kBFloat16:
        return p_.vectorised ? store<__nv_bfloat16, true>(tile, acc, coords, operands)
                             : store<__nv_bfloat16, false>(tile, acc, coords, operands);
      case DType::kFloat16:
        return p_.vectorised ? store<__half, true>(tile, acc, coords, operands)
                             : store<__half, false>(tile, acc, coords, operands);
      default:
        return p_.vectorised ? store<float, true>(tile, acc, coords, operands)
                             : store<float, false>(tile, acc, coords, operands);
    }
  }

 private:
  // The size of D, the origin of the tile, and the first row of its batch.
  struct Tile {
    int M, N, m, n, batch;
  };

  template <class T, bool kVectorised, class Acc, class Coords>
  CUTLASS_DEVICE void store(Tile const& tile, Acc const& acc, Coords const& coords, Operands const& operands) const {
    using namespace cute;
    constexpr int kBlocks = decltype(size<0, 2>(acc))::value;  // blocks of 8 columns in one MMA
    constexpr int kRows = decltype(size<1>(acc))::value;
    static_assert(kBlocks % 4 == 0, "columns are stored 32 at a time");
    const auto row = [&](int mi, int half) { return get<0>(coords(make_coord(_0{}, half, _0{}), mi, _0{})); };

    // This lane's first 16 bytes in rows of D stand here, and so many rows and columns from there on exist.
    const int first_m = tile.m + row(0, 0), first_n = tile.n + 8 * (threadIdx.x & 3);
    T* const first = static_cast<T*>(p_.d) + (int64_t{tile.batch} + first_m) * p_.ldd + first_n;
    const int rows_left = tile.M - first_m, columns_left = tile.N - first_n;

    float scale_a[kRows][2];
    CUTLASS_PRAGMA_UNROLL
    for (int mi = 0; mi < kRows; ++mi) {
      CUTLASS_PRAGMA_UNROLL
      for (int half = 0; half < 2; ++half) scale_a[mi][half] = operands.rows[row(mi, half)].scale;
    }
    CUTLASS_PRAGMA_UNROLL
    for (int ni = 0; ni < size<2>(acc); ++ni) {
      CUTLASS_PRAGMA_UNROLL
      for (int block = 0; block < kBlocks; block += 4) {
        // This keeps the reads of later columns out: hoisted all together they would spill the accumulators.
        asm volatile("" ::: "memory");
        const int column = get<1>(coords(make_coord(_0{}, _0{}, block), _0{}, ni));  // of this lane, in the tile
        const int n = tile.n + column;
        typename Operands::Columns of_columns[4];
        CUTLASS_PRAGMA_UNROLL
        for (int b = 0; b < 4; ++b) of_columns[b] = operands.columns[column / 2 + 4 * b];
        CUTLASS_PRAGMA_UNROLL
        for (int mi = 0; mi < kRows; ++mi) {
          uint32_t w[2][4];  // of both halves
          CUTLASS_PRAGMA_UNROLL
          for (int half = 0; half < 2; ++half) {
            const int m = tile.m + row(mi, half);
            const auto value = [&](int b, int c) {
              return acc(make_coord(c, half, block + b), mi, ni) * scale_a[mi][half] * of_columns[b].scale[c] +
                     of_columns[b].shift[c];
            };
            if constexpr (!kVectorised) {
              CUTLASS_PRAGMA_UNROLL
              for (int b = 0; b < 4; ++b) {
                store_element<T>(value(b, 0), m, n + 8 * b, tile);
                store_element<T>(value(b, 1), m, n + 8 * b + 1, tile);
              }
            } else if constexpr (sizeof(T) == 4) {
              CUTLASS_PRAGMA_UNROLL
              for (int b = 0; b < 4; ++b) {
                if (m < tile.M && n + 8 * b < tile.N) {
                  *reinterpret_cast<float2*>(address<T>(m, n + 8 * b, tile)) = make_float2(value(b, 0), value(b, 1));
                }
              }
            } else {
              CUTLASS_PRAGMA_UNROLL
              for (int b = 0; b < 4; ++b) w[half][b] = pack2(T{}, value(b, 0), value(b, 1));
              if (!p_.transposed) {
                // A warp stores 8 rows x 32 columns, each lane 8 columns of its row, in its own block.
                if constexpr (!kPermutedN) transpose_quad(w[half], threadIdx.x & 3);
                const int down = row(mi, half) - row(0, 0), right = column - get<1>(coords(_0{}));
                if (down < rows_left && right < columns_left) {
                  store16(first + uint64_t(uint32_t(down)) * uint64_t(p_.ldd) + right, w[half][0], w[half][1],
                          w[half][2], w[half][3]);
                }
              }
            }
          }
          if constexpr (kVectorised && sizeof(T) == 2) {
            if (p_.transposed) store_columns(p_, w, tile.m + row(mi, 0), n, tile.M, tile.N);
          }
        }
      }
    }
  }

  template <class T>
  CUTLASS_DEVICE T* address(int m, int n, Tile const& tile) const {
    return static_cast<T*>(p_.d) + (p_.transposed ? n * p_.ldd + m : (tile.batch + m) * p_.ldd + n);
  }

  // Stores one element, for outputs whose rows are not aligned.
  template <class T>
  CUTLASS_DEVICE void store_element(float v, int m, int n, Tile const& tile) const {
    if (m < tile.M && n < tile.N) detail::convert(*address<T>(m, n, tile), v);
  }
};

}  // namespace sparse24::cuda
