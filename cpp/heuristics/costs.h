/// @file
/// What tiles cost. The constants of the cost model are rows, each of which names the record that it comes from.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "sparse24/gemm.h"

namespace sparse24 {

enum class Product { kSparse, kDense };
constexpr int kProducts = 2, kWidths = 2;  ///< of types: 16 bits, 8 bits
constexpr int width_of(DType dtype) { return dtype == DType::kFloat8E4M3 ? 1 : 0; }

/// What one tile costs. Columns are columns of K.
struct TileCost {
  double throughput = 0;         ///< relative to one tile of its kind, where tiles fill the machine; 0: never chosen
  double start = 0;              ///< columns that a wave costs beside its products
  double tail = 0;               ///< columns that the last epilogue costs, which has no products to run under
  double half_empty = 1;         ///< time over what the number of tiles says, where the last column is half empty
  double along_n = 1;            ///< time of an order along N over that of one along M which reads as much
  double hidden_reading = 1e-3;  ///< of the time of reading under products, what it costs; as it is, ties are decided
};
/// What a kind of product costs, in one width of types.
struct ProductCost {
  double mac_us = 0;      ///< a multiply-add of one multiprocessor of the reference device, at throughput 1
  double order_tb_s = 0;  ///< what the operands of all running tiles are read at
  double read_tb_s = 0;   ///< what B is read at by few tokens; 0: not counted
};
/// What all products cost alike.
struct CommonCost {
  double unshared = 0;      ///< reading over that of the rectangle of running clusters, which do not share all in time
  double overlap = 0;       ///< the share of the shorter of reading and computing that is not hidden
  double quarter_wave = 0;  ///< a wave of quarters of tiles over one of tiles
  double cached_share = 0;  ///< of L2, that keeps what running clusters read until the next ones do
  double launch_us = 0;     ///< of the kernel that adds up parts of K
  double sums_tb_s = 0;     ///< what their sums are written and read at
};
struct Costs {
  std::array<std::array<std::array<TileCost, kGemmTiles>, kWidths>, kProducts> tiles{};
  std::array<std::array<ProductCost, kWidths>, kProducts> products{};
  CommonCost common;

  const TileCost& tile(Product product, DType dtype, GemmTile tile) const {
    return tiles[int(product)][width_of(dtype)][int(tile)];
  }
  const ProductCost& product(Product product, DType dtype) const { return products[int(product)][width_of(dtype)]; }
};

/// One constant. `product` is "sparse" or "dense", `bits` 16, 8, or 0 for both, and `tile` a name as "128x256"; ""
/// stands for all of them.
struct CostRow {
  std::string product;
  int bits;
  std::string tile, field;
  double value;
  std::string record;
};

/// Makes the structure of rows. Throws at a row that is of nothing.
Costs costs_of(const std::vector<CostRow>& rows);
/// The rows of heuristics/sm90_costs.inc.
const std::vector<CostRow>& measured_rows();
const Costs& measured_costs();

}  // namespace sparse24
