// The constants of the cost model, which come as rows and become structures.
#include "heuristics/costs.h"

#include "sparse24/error.h"

namespace sparse24 {
namespace {

template <class T>
struct Field {
  const char* name;
  double T::* member;
};
constexpr Field<TileCost> kTileFields[] = {
    {"throughput", &TileCost::throughput},
    {"start", &TileCost::start},
    {"tail", &TileCost::tail},
    {"half_empty", &TileCost::half_empty},
    {"along_n", &TileCost::along_n},
    {"hidden_reading", &TileCost::hidden_reading},
};
constexpr Field<ProductCost> kProductFields[] = {
    {"mac_us", &ProductCost::mac_us},
    {"order_tb_s", &ProductCost::order_tb_s},
    {"read_tb_s", &ProductCost::read_tb_s},
};
constexpr Field<CommonCost> kCommonFields[] = {
    {"unshared", &CommonCost::unshared},         {"overlap", &CommonCost::overlap},
    {"quarter_wave", &CommonCost::quarter_wave}, {"cached_share", &CommonCost::cached_share},
    {"launch_us", &CommonCost::launch_us},       {"sums_tb_s", &CommonCost::sums_tb_s},
};
constexpr const char* kProductNames[kProducts] = {"sparse", "dense"};
constexpr int kBits[kWidths] = {16, 8};

// Sets the field of that name; false if there is none.
template <class T, size_t kCount>
bool set(T& of, const Field<T> (&fields)[kCount], const CostRow& row) {
  for (const Field<T>& field : fields) {
    if (row.field == field.name) {
      of.*field.member = row.value;
      return true;
    }
  }
  return false;
}

bool apply(Costs& costs, const CostRow& row) {
  if (row.product.empty()) return set(costs.common, kCommonFields, row);
  bool known = false;
  for (int p = 0; p < kProducts; ++p) {
    for (int w = 0; w < kWidths; ++w) {
      if (row.product != kProductNames[p] || (row.bits != 0 && row.bits != kBits[w])) continue;
      if (row.tile.empty()) known |= set(costs.products[p][w], kProductFields, row);
      for (int t = 0; t < kGemmTiles; ++t) {
        if (row.tile.empty() || row.tile == name_of(GemmTile(t))) known |= set(costs.tiles[p][w][t], kTileFields, row);
      }
    }
  }
  return known;
}

}  // namespace

Costs costs_of(const std::vector<CostRow>& rows) {
  Costs costs;
  for (const CostRow& row : rows) {
    check(apply(costs, row), "sparse24: expected a row of costs to be of a product, a tile and a field, got \"",
          row.product, "\", ", row.bits, " bits, \"", row.tile, "\", \"", row.field, '"');
  }
  return costs;
}

const std::vector<CostRow>& measured_rows() {
  static const std::vector<CostRow> rows = {
#include "heuristics/sm90_costs.inc"
  };
  return rows;
}

const Costs& measured_costs() {
  static const Costs costs = costs_of(measured_rows());
  return costs;
}

}  // namespace sparse24
