// The epilogue of linear_relu2_gradient: dh = dy * 2 sqrt(y), y dense, straight from the accumulators; in float16 also
// from the roots of y.
//
// A lane's fragment has two columns of each block of 8 (epilogues/base.cuh draws it). Once dy is rounded it is
// transposed over the quad, so that each lane has 16 bytes of one row, which it multiplies and stores where it loaded
// those of y.
#pragma once

#include "common/packed.cuh"
#include "common/warp.cuh"
#include "gemm/sm90/epilogues/base.cuh"
#include "gemm/sm90/epilogues/derivative.cuh"

namespace sparse24::cuda {

// The arguments as the device sees them.
template <class T>
struct Relu2GradientParams : StoredDerivative<T> {
  int tokens, features;
  const void* y;
  void* dh;
};

// All matrices have the 16-bit type T.
template <class T, int kTileM, int kTileN>
class Relu2GradientEpilogue : public EpilogueBase<Relu2GradientParams<T>, NoStorage> {
  using Base = EpilogueBase<Relu2GradientParams<T>, NoStorage>;
  using Base::p_;

 public:
  using Base::Base;

  template <class Problem, class BlockShape, class BlockCoord, class Engine, class Layout, class TiledMma,
            class Residue>
  CUTLASS_DEVICE void operator()(Problem const&, BlockShape const& block_shape, BlockCoord const& block_coord,
                                 cute::Tensor<Engine, Layout> const& acc, TiledMma tiled_mma, Residue const&,
                                 int thread_idx, char*) const {
    using namespace cute;
    static_assert(is_same_v<decltype(take<0, 2>(block_shape)), Shape<Int<kTileM>, Int<kTileN>>>, "this tile");
    constexpr int kBlocks = decltype(size<0, 2>(acc))::value;  // of 8 columns
    constexpr int kRows = decltype(size<1>(acc))::value;
    constexpr int kSteps = kBlocks / kStep, kParts = kSteps * kRows;
    static_assert(kTileN % (8 * kStep) == 0 && kBlocks % kStep == 0, "a step's columns lie in one MMA");
    static_assert(decltype(size<2>(acc))::value == 1, "one MMA spans the columns");

    const auto coords = tiled_mma.get_slice(thread_idx).partition_C(make_identity_tensor(take<0, 2>(block_shape)));
    const int q = threadIdx.x & 3;
    // A lane's fragment has columns 2q and 2q + 1 of each block; of the rows that it loads and stores it has block q.
    const Place first(p_, get<0>(block_coord) * kTileM + get<0>(coords(_0{})), get<1>(block_coord) * kTileN + 8 * q);
    // A warp goes through parts of 16 rows x 32 columns, those of the same rows after each other.
    const auto rows = [](int part) { return part / kSteps * (kTileM / kRows); };
    const auto columns = [](int part) { return part % kSteps * (8 * kStep); };

    Rows y = load(first, rows(0), columns(0));
    CUTLASS_PRAGMA_UNROLL
    for (int part = 0; part < kParts; ++part) {
      const int mi = part / kSteps, step = part % kSteps * kStep;
      uint32_t dy[2][kStep];
      CUTLASS_PRAGMA_UNROLL
      for (int half = 0; half < 2; ++half) {
        CUTLASS_PRAGMA_UNROLL
        for (int b = 0; b < kStep; ++b) {
          dy[half][b] = pack2(T{}, acc(make_coord(_0{}, half, step + b), mi, _0{}),
                              acc(make_coord(_1{}, half, step + b), mi, _0{}));
        }
        transpose_quad(dy[half], q);
      }
      // The next part is on its way while this one is multiplied and stored, in the registers that the accumulators of
      // this one have left.
      Rows next = y;
      if (part + 1 < kParts) next = load(first, rows(part + 1), columns(part + 1));
      CUTLASS_PRAGMA_UNROLL
      for (int half = 0; half < 2; ++half) store(dy[half], y.of[half], first, rows(part) + 8 * half, columns(part));
      y = next;
    }
  }

 private:
  static constexpr int kStep = 4;  // blocks whose columns of one row fill 4 x 16 bytes

  // A lane's first element of the tile. Others are at constant distances from it, one multiplication each: places of
  // their own would take more registers than beside the accumulators of a wide tile are left.
  struct Place {
    int token, feature;
    int tokens, features;  // those of [tokens, features]
    int64_t at;

    CUTLASS_DEVICE Place(Relu2GradientParams<T> const& p, int token_, int feature_)
        : token(token_),
          feature(feature_),
          tokens(p.tokens),
          features(p.features),
          at(int64_t(token_) * p.features + feature_) {}

    CUTLASS_DEVICE bool inside(int rows, int columns) const {
      return token + rows < tokens && feature + columns < features;
    }
    CUTLASS_DEVICE int64_t index(int rows, int columns) const { return at + int64_t(rows) * features + columns; }
  };

  // 16 bytes of a row, and of the one eight further, as they lie in memory: to unpack them is to wait for them.
  struct Rows {
    uint4 of[2];
  };

  // Loads y, and zeros beyond the last row and column. It does not use load16, because the kernel may have started
  // while the one before it was writing y, which is therefore not read-only to this one.
  CUTLASS_DEVICE Rows load(Place const& first, int rows, int columns) const {
    Rows out{};
    CUTLASS_PRAGMA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int r = rows + 8 * half;
      if (first.inside(r, columns))
        out.of[half] = *reinterpret_cast<const uint4*>(static_cast<const T*>(p_.y) + first.index(r, columns));
    }
    return out;
  }

  // Stores dh where `load` found y.
  CUTLASS_DEVICE void store(uint32_t const (&dy)[kStep], uint4 const& y, Place const& first, int rows,
                            int columns) const {
    if (!first.inside(rows, columns)) return;
    const uint32_t of_y[] = {y.x, y.y, y.z, y.w};
    uint32_t dh[] = {dy[0], dy[1], dy[2], dy[3]};
    p_.apply(dh, of_y);
    store16(static_cast<T*>(p_.dh) + first.index(rows, columns), dh[0], dh[1], dh[2], dh[3]);
  }
};

}  // namespace sparse24::cuda
