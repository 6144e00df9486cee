// A scheduler (schedulers/scheduler.cuh) for rows that are sorted by expert, each with a weight of its own (experts.h).
// A tile of 128 rows belongs to one expert, so that its last tile may be partly empty.
//
// Two CTAs along M that share the columns of w read half as much of it each, which products need: without it they wait
// for L2. But pairs of tiles would cost an expert with an odd number of them a whole empty one. So the last tile of
// such an expert stands alone, and the two CTAs of a cluster take two of its neighbours along N. With 5 tiles of rows
// and 4 columns of tiles, clusters work on
//
//     rows    0     0 0   1 1   2 2   3 3        cluster 0 has tiles (0, 0) and (1, 0), one below the other
//             1     0 0   1 1   2 2   3 3
//             2     ...
//             4     8 8   8 8   9 9   9 9        cluster 8 has tiles (4, 0) and (4, 1)
//
// Experts follow each other, so that the weights of few of them are in L2 at a time. Each CTA makes a table of what
// lies before an expert from the offsets, in shared memory, and finds the expert of a cluster in it by bisection.
#pragma once

#include <cutlass/cutlass.h>

#include <algorithm>
#include <cstdint>

#include "gemm/sm90/schedulers/scheduler.cuh"
#include "sparse24/experts.h"
#include "sparse24/gemm.h"

namespace sparse24::cuda {

// Where a tile lies. `end` is where its expert's rows end, or `row` where the tile has none, beyond the columns.
struct ExpertPlace {
  int n, expert;
  int row, end;
  int padded_row;
  bool shares_columns;  // with the other CTA of the cluster

  CUTLASS_HOST_DEVICE int rows() const { return end - row; }
};
CUTLASS_HOST_DEVICE ExpertPlace const& coordinates(ExpertPlace const& at) { return at; }

class ExpertScheduler {
 public:
  static constexpr int kParts = 1;
  static constexpr bool kReadsMemory = true, kVariesK = false;
  using PlaceOfTile = ExpertPlace;
  struct Params {
    const int32_t* offsets;
    int experts, rows, tiles_n;
    uint32_t clusters;
  };
  // What lies before an expert, and behind the last: rows, tiles of rows, clusters.
  struct Shared {
    int rows[kMostExperts + 1], tiles[kMostExperts + 1], clusters[kMostExperts + 1];
  };

  static Params params(ResultShape const& shape, GemmConfig const&, int multiprocessors) {
    const int tiles_n = cutlass::ceil_div(shape.n, shape.tile_n);
    const int64_t tiles = Experts::padded_rows(shape.m, shape.batches) / kExpertRows;
    const auto clusters = uint32_t(std::min<int64_t>(multiprocessors / 2, tiles * tiles_n));
    return {shape.offsets, shape.batches, shape.m, tiles_n, clusters};
  }
  static dim3 grid(Params const& params) { return dim3(2 * params.clusters); }

  // How many clusters compute so many tiles of rows.
  CUTLASS_HOST_DEVICE static int clusters_of(int tiles, int tiles_n) {
    return tiles / 2 * tiles_n + tiles % 2 * ((tiles_n + 1) / 2);
  }

  // A tile of an expert that has so many tiles of rows, by the number of its cluster in the expert.
  struct Within {
    int m, n;
    bool shares_columns;
  };
  CUTLASS_HOST_DEVICE static Within within(int cluster, int rank, int tiles, int tiles_n) {
    const int pairs = tiles / 2;
    if (cluster >= pairs * tiles_n) return {tiles - 1, 2 * (cluster - pairs * tiles_n) + rank, false};
    // Groups of pairs are each walked along N.
    const int group = cluster / (kPairs * tiles_n), first = group * kPairs;
    const int width = min_of(pairs - first, kPairs), place = cluster - first * tiles_n;
    return {2 * (first + place % width) + rank, place / width, true};
  }

  // Makes the table: all threads of the CTA call it.
  CUTLASS_DEVICE static void fill(Params const& p, Shared& table) {
    for (int e = threadIdx.x; e < p.experts; e += blockDim.x) table.rows[e + 1] = p.offsets[e];
    __syncthreads();
    if (threadIdx.x < 32) {
      constexpr unsigned kAll = 0xffffffffu;
      const int lane = threadIdx.x;
      int row = 0, tiles = 0, clusters = 0;
      if (lane == 0) table.rows[0] = table.tiles[0] = table.clusters[0] = 0;
      for (int first = 0; first < p.experts; first += 32) {
        const int e = first + lane;
        int end = e < p.experts ? min(table.rows[e + 1], p.rows) : 0;
        end = max(end, row);
        CUTLASS_PRAGMA_UNROLL
        for (int d = 1; d < 32; d *= 2) {
          const int before = __shfl_up_sync(kAll, end, d);
          if (lane >= d) end = max(end, before);
        }
        const int before = __shfl_up_sync(kAll, end, 1);
        int t = cutlass::ceil_div(end - (lane == 0 ? row : before), kExpertRows);
        int c = clusters_of(t, p.tiles_n);
        CUTLASS_PRAGMA_UNROLL
        for (int d = 1; d < 32; d *= 2) {
          const int t_before = __shfl_up_sync(kAll, t, d), c_before = __shfl_up_sync(kAll, c, d);
          if (lane >= d) t += t_before, c += c_before;
        }
        if (e < p.experts) {
          table.rows[e + 1] = end;
          table.tiles[e + 1] = tiles + t;
          table.clusters[e + 1] = clusters + c;
        }
        row = __shfl_sync(kAll, end, 31);
        tiles += __shfl_sync(kAll, t, 31);
        clusters += __shfl_sync(kAll, c, 31);
      }
    }
    __syncthreads();
  }

  CUTLASS_DEVICE ExpertScheduler(Params const& params, Shared const& table)
      : ExpertScheduler(params, table, blockIdx.x) {}
  CUTLASS_HOST_DEVICE ExpertScheduler(Params const& params, Shared const& table, uint32_t cta)
      : p_(params), table_(table), cta_(cta) {}

  CUTLASS_HOST_DEVICE uint32_t first() const { return cta_; }
  CUTLASS_HOST_DEVICE uint32_t stride() const { return 2 * p_.clusters; }
  CUTLASS_HOST_DEVICE bool has_tile(uint32_t i) const { return i / 2 < uint32_t(table_.clusters[p_.experts]); }

  CUTLASS_HOST_DEVICE ExpertPlace tile(uint32_t i) const {
    int cluster = int(i / 2);
    const int rank = int(i % 2), e = expert_of(cluster);
    cluster -= table_.clusters[e];
    const auto [m, n, shares] = within(cluster, rank, table_.tiles[e + 1] - table_.tiles[e], p_.tiles_n);
    const int row = table_.rows[e] + m * kExpertRows;
    return {n, e, row, n < p_.tiles_n ? table_.rows[e + 1] : row, (table_.tiles[e] + m) * kExpertRows, shares};
  }
  // Where the rows of the last expert end.
  CUTLASS_HOST_DEVICE int end() const { return table_.rows[p_.experts]; }

 private:
  static constexpr int kPairs = 8;  // of tiles of rows that are walked together
  CUTLASS_HOST_DEVICE static int min_of(int a, int b) { return b < a ? b : a; }

  CUTLASS_HOST_DEVICE int expert_of(int cluster) const {
    int low = 0, high = p_.experts;  // clusters[low] <= cluster < clusters[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (table_.clusters[middle] <= cluster) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }

  Params const& p_;
  Shared const& table_;
  uint32_t cta_;
};

}  // namespace sparse24::cuda
