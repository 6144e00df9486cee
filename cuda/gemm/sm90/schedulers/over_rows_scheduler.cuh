// A scheduler for products over the rows of each expert: d[e] [m, n] = a_e.T @ b_e of a [rows, m] and b [rows, n]. Each
// expert has as many tiles as any other, and as many K tiles as it has rows for. A tile of 128 x n lies where that of
// schedulers/expert_scheduler.cuh would, if each expert had m rows.
#pragma once

#include "gemm/sm90/schedulers/expert_scheduler.cuh"

namespace sparse24::cuda {

// `row`, `end` are rows of d, whose experts lie below each other.
struct OverRowsPlace : ExpertPlace {
  int k_row;   // the expert's first row of a and b
  int column;  // the tile's first column of a
};
CUTLASS_HOST_DEVICE OverRowsPlace const& coordinates(OverRowsPlace const& at) { return at; }

class OverRowsScheduler {
 public:
  static constexpr int kParts = 1;
  static constexpr bool kReadsMemory = true, kVariesK = true;
  using PlaceOfTile = OverRowsPlace;
  using Shared = ExpertScheduler::Shared;  // of which rows are used
  struct Params {
    ExpertScheduler::Params rows;
    int m, tiles_m, clusters_of_expert;
  };

  static Params params(ResultShape const& shape, GemmConfig const&, int multiprocessors) {
    const int tiles_m = cutlass::ceil_div(shape.m, kExpertRows), tiles_n = cutlass::ceil_div(shape.n, shape.tile_n);
    const int of_expert = ExpertScheduler::clusters_of(tiles_m, tiles_n);
    const auto clusters = uint32_t(std::min<int64_t>(multiprocessors / 2, int64_t(shape.batches) * of_expert));
    return {{shape.offsets, shape.batches, shape.k, tiles_n, clusters}, shape.m, tiles_m, of_expert};
  }
  static dim3 grid(Params const& params) { return ExpertScheduler::grid(params.rows); }
  CUTLASS_DEVICE static void fill(Params const& p, Shared& table) { ExpertScheduler::fill(p.rows, table); }

  CUTLASS_DEVICE OverRowsScheduler(Params const& params, Shared const& table)
      : OverRowsScheduler(params, table, blockIdx.x) {}
  CUTLASS_HOST_DEVICE OverRowsScheduler(Params const& params, Shared const& table, uint32_t cta)
      : p_(params), table_(table), cta_(cta) {}

  CUTLASS_HOST_DEVICE uint32_t first() const { return cta_; }
  CUTLASS_HOST_DEVICE uint32_t stride() const { return 2 * p_.rows.clusters; }
  CUTLASS_HOST_DEVICE bool has_tile(uint32_t i) const {
    return i / 2 < uint32_t(p_.rows.experts) * uint32_t(p_.clusters_of_expert);
  }
  CUTLASS_HOST_DEVICE int k_rows(uint32_t i) const {
    const int e = expert_of(i);
    return table_.rows[e + 1] - table_.rows[e];
  }
  CUTLASS_HOST_DEVICE OverRowsPlace tile(uint32_t i) const {
    const int e = expert_of(i);
    const auto at =
        ExpertScheduler::within(int(i / 2) - e * p_.clusters_of_expert, int(i % 2), p_.tiles_m, p_.rows.tiles_n);
    const int row = e * p_.m + at.m * kExpertRows;
    return {{at.n, e, row, at.n < p_.rows.tiles_n ? (e + 1) * p_.m : row, row, at.shares_columns},
            table_.rows[e],
            at.m * kExpertRows};
  }
  // Where the rows of the last expert of d end: there are none of no expert.
  CUTLASS_HOST_DEVICE int end() const { return p_.rows.experts * p_.m; }

 private:
  CUTLASS_HOST_DEVICE int expert_of(uint32_t i) const { return int(i / 2) / p_.clusters_of_expert; }

  Params const& p_;
  Shared const& table_;
  uint32_t cta_;
};

}  // namespace sparse24::cuda
