/// @file
/// Runs an epilogue of cuda/ on the host, over all tiles of a result. Comes before the headers of cuda/.
///
/// The fragments are those of CuTe's own MMA types, so that a wrong lane map gives wrong results, and the threads are
/// numbered as in CUTLASS's warp-specialised kernels.
#pragma once

#include "emulator/intrinsics.h"
#include "emulator/ptx.h"
// After them.
#include <cutlass/bfloat16.h>
#include <cutlass/cutlass.h>

#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/mma_sm90_gmma_sparse.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>

#include "emulator/guarded.h"
#include "gemm/sm90/epilogues/steps.cuh"

namespace sparse24::emulate {

/// How the two consumer warpgroups of a kernel divide tiles among them.
enum class Schedule {
  kCooperative,  ///< rows of one tile
  kPingpong,     ///< a tile each
  kOverlapped,   ///< rows of one tile, which they finish under the next; for epilogues in steps
};

/// Which tiles run beside those of the result.
enum class Beyond {
  kTiles,  ///< as under a swizzle, some wholly below and to the right of it
  kNone,   ///< what its own tiles do not write is not written
};

/// A tile of kM x kN and its MMA. `kSparse`: that of the sparse mainloop. Clusters of kClusterM tiles run even where
/// the last of them lie below the result, and swizzled orders of tiles run some that lie beyond it.
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
  using Warpgroups = cute::Layout<cute::Shape<cute::Int<kSchedule == Schedule::kPingpong ? 1 : 2>, cute::_1, cute::_1>>;
  using Mma = decltype(cute::make_tiled_mma(atom(), Warpgroups{}));
};

/// True for epilogues in steps (epilogues/steps.cuh), which finish a tile under the next one.
template <class Epilogue, class = void>
struct HasSteps : std::false_type {};
template <class Epilogue>
struct HasSteps<Epilogue, std::void_t<decltype(Epilogue::kSteps)>> : std::true_type {};

/// True for epilogues that OperandsAdapter hosts; the others are hosted by CUTLASS's own adapter.
template <class Epilogue, class = void>
struct HasOperands : std::false_type {};
template <class Epilogue>
struct HasOperands<Epilogue, std::void_t<typename Epilogue::Operands>> : std::true_type {};

/// The column of a result that a column of a tile is: one of the epilogue's own order, if it has one.
template <class Epilogue, class = void>
struct ColumnOrder {
  static int of(const typename Epilogue::Params&, int column) { return column; }
};
template <class Epilogue>
struct ColumnOrder<Epilogue, std::void_t<decltype(Epilogue::column_of(std::declval<typename Epilogue::Params>(), 0))>> {
  static int of(const typename Epilogue::Params& p, int column) { return Epilogue::column_of(p, column); }
};

/// The operands of all tiles, if there are any. Poisoned before: one that is not fetched is NaN.
template <class Epilogue, class Shape, class Params, class Problem, class Place>
std::vector<Guarded> fetch_operands(const Params& params, const Problem& problem, int tiles, const Place& place) {
  std::vector<Guarded> all;
  if constexpr (HasOperands<Epilogue>::value) {
    using Operands = typename Epilogue::Operands;
    all.assign(tiles, Guarded(sizeof(Operands)));
    for (int tile = 0; tile < tiles; ++tile) {
      for (int lane = 0; lane < 32; ++lane) {
        Operands& of_tile = *all[tile].template data<Operands>();
        if constexpr (HasSteps<Epilogue>::value) {
          const auto [m, n, k, batch] = place(tile);
          Epilogue::fetch(params, lane, m * Operands::kM, n * Operands::kN, of_tile);
        } else {
          Epilogue(params).fetch(lane, problem, Shape{}, place(tile), of_tile);
        }
      }
      if (!all[tile].intact()) throw std::runtime_error("the epilogue fetched outside of its operands");
    }
  }
  return all;
}

/// Runs `Epilogue` over `batches` results [rows, cols] as one persistent CTA would: the lanes of a warp fetch the
/// operands of each tile, if it has any, then the warpgroups store it. `accumulator(m, n, batch)` is defined beyond
/// rows and cols too.
template <class Epilogue, class Tile, class Accumulator>
void run_epilogue(const typename Epilogue::Params& params, int rows, int cols, const Accumulator& accumulator,
                  Order order, int batches = 1, Beyond beyond = Beyond::kTiles) {
  using namespace cute;
  using Shape = typename Tile::Shape;
  constexpr int kClusterRows = Tile::kM * Tile::kClusterM;
  const int more = beyond == Beyond::kTiles;
  const int tiles_m = ((rows + kClusterRows - 1) / kClusterRows + more) * Tile::kClusterM;
  const int tiles_n = (cols + Tile::kN - 1) / Tile::kN + more;
  const int tiles = tiles_m * tiles_n * batches;
  const auto problem = make_shape(rows, cols, 64, batches);
  const auto place = [&](int tile) {
    return make_coord(tile / tiles_n % tiles_m, tile % tiles_n, _, tile / tiles_n / tiles_m);
  };

  std::vector<Guarded> operands = fetch_operands<Epilogue, Shape>(params, problem, tiles, place);

  // The first warpgroup of the kernel is the producer.
  Block(128, 256, order).run([&] {
    typename Tile::Mma mma;
    Epilogue epilogue(params);
    const int thread = int(threadIdx.x) % int(size(mma));
    const auto coords = mma.get_slice(thread).partition_C(make_identity_tensor(take<0, 2>(Shape{})));
    auto acc = partition_fragment_C(mma, take<0, 2>(Shape{}));
    for (int tile = 0; tile < tiles; ++tile) {
      if (Tile::kSchedule == Schedule::kPingpong && tile % 2 != int(threadIdx.x / 128) - 1) continue;
      const auto [m, n, k, batch] = place(tile);
      for (int i = 0; i < size(acc); ++i) {
        const int column = n * Tile::kN + ColumnOrder<Epilogue>::of(params, int(get<1>(coords(i))));
        acc(i) = accumulator(m * Tile::kM + int(get<0>(coords(i))), column, batch);
      }
      if constexpr (HasSteps<Epilogue>::value) {
        cuda::visit_all(epilogue);  // the tile before
        cuda::AccumulatorScales scales(*operands[tile].template data<const typename Epilogue::Operands>(),
                                       int(get<0>(coords(0))));
        epilogue.begin(m * Tile::kM, n * Tile::kN, acc(_, _0{}, _0{}), scales);
      } else if constexpr (HasOperands<Epilogue>::value) {
        const auto& of_tile = *operands[tile].template data<const typename Epilogue::Operands>();
        epilogue(problem, Shape{}, place(tile), acc, mma, thread, of_tile);
      } else {
        epilogue(problem, Shape{}, place(tile), acc, mma, /*residue=*/0, thread, /*shared=*/nullptr);
      }
    }
    if constexpr (HasSteps<Epilogue>::value) cuda::visit_all(epilogue);
  });
}

}  // namespace sparse24::emulate
