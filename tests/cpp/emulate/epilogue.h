/// @file
/// Runs an epilogue of cuda/ on the host, over all tiles of a result. Comes before the headers of cuda/.
///
/// The fragments are those of CuTe's own MMA types, so that a wrong lane map gives wrong results, and the threads are
/// numbered as in CUTLASS's warp-specialised kernels.
#pragma once

#include "emulate/intrinsics.h"
#include "emulate/ptx.h"
// After them.
#include <cutlass/bfloat16.h>
#include <cutlass/cutlass.h>

#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/mma_sm90_gmma_sparse.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>

#include "emulate/guarded.h"

namespace sparse24::emulate {

/// How the two consumer warpgroups of a kernel divide tiles among them.
enum class Schedule {
  kCooperative,  ///< rows of one tile
  kPingpong,     ///< a tile each
};

/// A tile of kM x kN and its MMA. `kSparse`: that of the sparse mainloop. Clusters of kClusterM tiles run even where
/// the last of them lie below the result.
template <int kM_, int kN_, Schedule kSchedule_, bool kSparse = false, int kClusterM_ = 2>
struct Tile {
  static constexpr int kM = kM_, kN = kN_, kClusterM = kClusterM_;
  static constexpr Schedule kSchedule = kSchedule_;
  using Shape = cute::Shape<cute::Int<kM>, cute::Int<kN>, cute::_64>;
  static constexpr auto atom() {
    using Element = cutlass::bfloat16_t;  // accumulators lie alike for all types
    if constexpr (kSparse) {
      return cute::GMMA::ss_op_selector_sparse<Element, Element, float, Shape>();
    } else {
      return cute::GMMA::ss_op_selector<Element, Element, float, Shape>();
    }
  }
  using Warpgroups =
      cute::Layout<cute::Shape<cute::Int<kSchedule == Schedule::kCooperative ? 2 : 1>, cute::_1, cute::_1>>;
  using Mma = decltype(cute::make_tiled_mma(atom(), Warpgroups{}));
};

/// Runs `Epilogue` over `batches` results [rows, cols] as one persistent CTA would: shared memory is that of the tile
/// before. `accumulator(m, n, batch)` is defined for whole clusters of tiles, so beyond rows and cols too.
template <class Epilogue, class Tile, class Accumulator>
void run_epilogue(const typename Epilogue::Params& params, int rows, int cols, const Accumulator& accumulator,
                  Order order, int batches = 1) {
  using namespace cute;
  using Shape = typename Tile::Shape;
  const int tiles_m = (rows + Tile::kM * Tile::kClusterM - 1) / (Tile::kM * Tile::kClusterM) * Tile::kClusterM;
  const int tiles_n = (cols + Tile::kN - 1) / Tile::kN;
  Guarded shared(sizeof(typename Epilogue::SharedStorage));

  // The first warpgroup of the kernel is the producer.
  Block(128, 256, order).run([&] {
    typename Tile::Mma mma;
    Epilogue epilogue(params);
    const int thread = int(threadIdx.x) % int(size(mma));
    const auto coords = mma.get_slice(thread).partition_C(make_identity_tensor(take<0, 2>(Shape{})));
    auto acc = partition_fragment_C(mma, take<0, 2>(Shape{}));
    for (int tile = 0; tile < tiles_m * tiles_n * batches; ++tile) {
      if (Tile::kSchedule == Schedule::kPingpong && tile % 2 != int(threadIdx.x / 128) - 1) continue;
      const int m = tile / tiles_n % tiles_m, n = tile % tiles_n, batch = tile / tiles_n / tiles_m;
      for (int i = 0; i < size(acc); ++i) {
        acc(i) = accumulator(m * Tile::kM + int(get<0>(coords(i))), n * Tile::kN + int(get<1>(coords(i))), batch);
      }
      epilogue(make_shape(rows, cols, 64, batches), Shape{}, make_coord(m, n, _, batch), acc, mma,
               make_tuple(rows - m * Tile::kM, cols - n * Tile::kN, _0{}), thread, shared.data<char>());
    }
  });
  if (!shared.intact()) throw std::runtime_error("the epilogue wrote outside of its shared memory");
}

}  // namespace sparse24::emulate
