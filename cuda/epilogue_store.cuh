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
    switch (p_.d_dtype) {
      case DType::kBFloat16: return store<__nv_bfloat16>(problem, block_shape, block_coord, acc, tiled_mma, thread_idx);
      case DType::kFloat16: return store<__half>(problem, block_shape, block_coord, acc, tiled_mma, thread_idx);
      default: return store<float>(problem, block_shape, block_coord, acc, tiled_mma, thread_idx);
    }
  }

 private:
  template <class T, class Problem, class BlockShape, class BlockCoord, class Acc, class TiledMma>
  CUTLASS_DEVICE void store(Problem const& problem, BlockShape const& block_shape, BlockCoord const& block_coord,
                            Acc const& acc, TiledMma tiled_mma, int thread_idx) const {
    using namespace cute;
    const int M = get<0>(problem), N = get<1>(problem);
    const auto coords = tiled_mma.get_slice(thread_idx).partition_C(make_identity_tensor(take<0, 2>(block_shape)));
    const int m_tile = get<0>(block_coord) * size<0>(block_shape);
    const int n_tile = get<1>(block_coord) * size<1>(block_shape);

    constexpr int kBlocks = decltype(size<0, 2>(acc))::value;  // blocks of 8 columns in one MMA
    static_assert(kBlocks % 4 == 0, "columns are stored 32 at a time");

    // Values are packed as soon as they are scaled: 256x192 leaves few registers beside its accumulators.
    CUTLASS_PRAGMA_UNROLL
    for (int mi = 0; mi < size<1>(acc); ++mi) {
      CUTLASS_PRAGMA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int m = m_tile + get<0>(coords(make_coord(_0{}, half, _0{}), mi, _0{}));
        const float scale_a = p_.scale_a && m < M ? p_.scale_a[m * p_.scale_a_stride] : 1.f;
        CUTLASS_PRAGMA_UNROLL
        for (int ni = 0; ni < size<2>(acc); ++ni) {
          CUTLASS_PRAGMA_UNROLL
          for (int block = 0; block < kBlocks; block += 4) {
            uint32_t w[4] = {};
            CUTLASS_PRAGMA_UNROLL
            for (int b = 0; b < 4; ++b) {
              const int n = n_tile + get<1>(coords(make_coord(_0{}, half, block + b), mi, ni));
              const float v0 = finish<T>(acc(make_coord(_0{}, half, block + b), mi, ni), scale_a, n, N);
              const float v1 = finish<T>(acc(make_coord(_1{}, half, block + b), mi, ni), scale_a, n + 1, N);
              if (sizeof(T) == 4 || !p_.vectorised) {
                store_element<T>(v0, m, n, M, N);
                store_element<T>(v1, m, n + 1, M, N);
              } else if constexpr (sizeof(T) == 2) {
                w[b] = pack2(T{}, v0, v1);
              }
            }
            if (sizeof(T) == 2 && p_.vectorised) {
              store_block<T>(w, m, n_tile + get<1>(coords(make_coord(_0{}, half, block), mi, ni)), M, N);
            }
          }
        }
      }
    }
  }

  template <class T>
  CUTLASS_DEVICE float finish(float acc, float scale_a, int n, int N) const {
    float v = acc * scale_a;
    if (p_.scale_b && n < N) v *= p_.scale_b[n * p_.scale_b_stride];
    if (p_.bias && n < N) {
      v += p_.bias_dtype == DType::kFloat32 ? static_cast<const float*>(p_.bias)[n]
                                            : float(static_cast<const T*>(p_.bias)[n]);
    }
    return v;
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
