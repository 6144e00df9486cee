// The epilogue of mm: D = scale_a * scale_b * acc + bias, straight from the accumulators to global memory.
//
// One class serves every output type and both majors at run time, so that kernels are instantiated per operand layout
// and tile only.
//
// A warpgroup's fragment, per block of 8 columns (PTX ISA, wgmma D fragments), lane = 4 r + q:
//
//     row r      columns 2q, 2q + 1   (half 0)
//     row r + 8  columns 2q, 2q + 1   (half 1)
//
// Four such blocks are transposed over the four lanes of a quad, so that each lane owns 8 neighbouring columns of one
// block: 16-byte stores. For D.T, movmatrix first turns each 8 x 8 block, so that lanes own neighbouring rows instead.
#pragma once

#include "epilogue_base.cuh"
#include "quad.cuh"
#include "sparse24/types.h"
#include "vocabulary.cuh"

namespace sparse24::cuda {

// Arguments as the device sees them.
struct StoreParams {
  void* d;
  int64_t ldd;
  DType d_dtype;
  bool transposed;  // d is D.T
  bool vectorised;  // rows of d are 16-byte aligned and a multiple of 8 long
  const float* scale_a;
  const float* scale_b;
  const void* bias;
  DType bias_dtype;    // d_dtype or kFloat32
  int scale_a_stride;  // 0: one element, 1: one per row
  int scale_b_stride;
};

namespace detail {

__device__ __forceinline__ void convert(__nv_bfloat16& d, float v) { d = __float2bfloat16_rn(v); }
__device__ __forceinline__ void convert(__half& d, float v) { d = __float2half_rn(v); }
__device__ __forceinline__ void convert(float& d, float v) { d = v; }

}  // namespace detail

class StoreEpilogue : public EpilogueBase<StoreParams> {
 public:
  using EpilogueBase<StoreParams>::EpilogueBase;

  template <class Problem, class BlockShape, class BlockCoord, class Engine, class Layout, class TiledMma,
            class Residue>
  CUTLASS_DEVICE void operator()(Problem const& problem, BlockShape const& block_shape, BlockCoord const& block_coord,
                                 cute::Tensor<Engine, Layout> const& acc, TiledMma tiled_mma, Residue const&,
                                 int thread_idx, char*) {
    using namespace cute;
    const auto coords = tiled_mma.get_slice(thread_idx).partition_C(make_identity_tensor(take<0, 2>(block_shape)));
    const Tile tile{static_cast<int>(get<0>(problem)), static_cast<int>(get<1>(problem)),
                    static_cast<int>(get<0>(block_coord) * size<0>(block_shape)),
                    static_cast<int>(get<1>(block_coord) * size<1>(block_shape))};
    // One decision for the whole tile: the loops below are too long to decide in.
    switch (p_.d_dtype) {
      case DType::kBFloat16:
        return p_.vectorised ? store<__nv_bfloat16, true>(tile, acc, coords)
                             : store<__nv_bfloat16, false>(tile, acc, coords);
      case DType::kFloat16:
        return p_.vectorised ? store<__half, true>(tile, acc, coords) : store<__half, false>(tile, acc, coords);
      default: return store<float, false>(tile, acc, coords);
    }
  }

 private:
  // Size of D and origin of the tile.
  struct Tile {
    int M, N, m, n;
  };

  // Only two warps share a scheduler here, so what counts is that loads come early and together: those of 32 columns,
  // then the rows that use them.
  template <class T, bool kVectorised, class Acc, class Coords>
  CUTLASS_DEVICE void store(Tile const& tile, Acc const& acc, Coords const& coords) const {
    using namespace cute;
    constexpr int kBlocks = decltype(size<0, 2>(acc))::value;  // blocks of 8 columns in one MMA
    constexpr int kRows = decltype(size<1>(acc))::value;
    static_assert(kBlocks % 4 == 0, "columns are stored 32 at a time");
    const auto row = [&](int mi, int half) { return tile.m + get<0>(coords(make_coord(_0{}, half, _0{}), mi, _0{})); };

    float scale_a[kRows][2];
    CUTLASS_PRAGMA_UNROLL
    for (int mi = 0; mi < kRows; ++mi) {
      CUTLASS_PRAGMA_UNROLL
      for (int half = 0; half < 2; ++half) {
        scale_a[mi][half] = p_.scale_a ? p_.scale_a[min(row(mi, half), tile.M - 1) * p_.scale_a_stride] : 1.f;
      }
    }
    CUTLASS_PRAGMA_UNROLL
    for (int ni = 0; ni < size<2>(acc); ++ni) {
      CUTLASS_PRAGMA_UNROLL
      for (int block = 0; block < kBlocks; block += 4) {
        // Keeps the loads of later columns out: hoisted all together they would spill the accumulators.
        asm volatile("" ::: "memory");
        const int n = tile.n + get<1>(coords(make_coord(_0{}, _0{}, block), _0{}, ni));  // of this lane
        float scale_b[4][2], bias[4][2];
        load_columns<T>(n, tile.N, scale_b, bias);
        CUTLASS_PRAGMA_UNROLL
        for (int mi = 0; mi < kRows; ++mi) {
          CUTLASS_PRAGMA_UNROLL
          for (int half = 0; half < 2; ++half) {
            const int m = row(mi, half);
            const auto value = [&](int b, int c) {
              return acc(make_coord(c, half, block + b), mi, ni) * scale_a[mi][half] * scale_b[b][c] + bias[b][c];
            };
            if constexpr (kVectorised) {
              uint32_t w[4];
              CUTLASS_PRAGMA_UNROLL
              for (int b = 0; b < 4; ++b) w[b] = pack2(T{}, value(b, 0), value(b, 1));
              store_block<T>(w, m, n, tile.M, tile.N);
            } else {
              CUTLASS_PRAGMA_UNROLL
              for (int b = 0; b < 4; ++b) {
                store_element<T>(value(b, 0), m, n + 8 * b, tile.M, tile.N);
                store_element<T>(value(b, 1), m, n + 8 * b + 1, tile.M, tile.N);
              }
            }
          }
        }
      }
    }
  }

  // Scales and biases of columns n + 8 b + c. Columns beyond the last take its own: they are not stored.
  template <class T>
  CUTLASS_DEVICE void load_columns(int n, int N, float (&scale_b)[4][2], float (&bias)[4][2]) const {
    const auto each = [&](float (&to)[4][2], auto load) {
      CUTLASS_PRAGMA_UNROLL
      for (int b = 0; b < 4; ++b) {
        CUTLASS_PRAGMA_UNROLL
        for (int c = 0; c < 2; ++c) to[b][c] = load(min(n + 8 * b + c, N - 1));
      }
    };
    each(scale_b, [](int) { return 1.f; });
    each(bias, [](int) { return 0.f; });
    if (p_.scale_b) each(scale_b, [&](int column) { return p_.scale_b[column * p_.scale_b_stride]; });
    if (p_.bias && p_.bias_dtype == DType::kFloat32) {
      each(bias, [&](int column) { return static_cast<const float*>(p_.bias)[column]; });
    } else if (p_.bias) {
      each(bias, [&](int column) { return float(static_cast<const T*>(p_.bias)[column]); });
    }
  }

  // 8 rows x 32 columns of a warp, (m, n) of this lane's first element; each lane stores 16 bytes: 8 columns of its row
  // in block q, or, as a row of D.T, the 8 rows of one column of block q.
  template <class T>
  CUTLASS_DEVICE void store_block(uint32_t (&w)[4], int m, int n, int M, int N) const {
    const int q = threadIdx.x & 3, r = (threadIdx.x & 31) >> 2;
    n += 6 * q;  // 8 q columns into the 32, instead of 2 q
    if (p_.transposed) {
      CUTLASS_PRAGMA_UNROLL
      for (int b = 0; b < 4; ++b) w[b] = transpose_8x8(w[b]);
      m -= r;
      n += r;
    }
    transpose_quad(w, q);
    if (m < M && n < N) {
      T* d = static_cast<T*>(p_.d) + (p_.transposed ? n * p_.ldd + m : m * p_.ldd + n);
      *reinterpret_cast<uint4*>(d) = make_uint4(w[0], w[1], w[2], w[3]);
    }
  }

  // One element: fp32, and outputs whose rows are not 16-byte aligned.
  template <class T>
  CUTLASS_DEVICE void store_element(float v, int m, int n, int M, int N) const {
    if (m < M && n < N) detail::convert(static_cast<T*>(p_.d)[p_.transposed ? n * p_.ldd + m : m * p_.ldd + n], v);
  }
};

}  // namespace sparse24::cuda
