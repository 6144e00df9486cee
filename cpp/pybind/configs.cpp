/// @file
/// Configurations, their choice and its cost model as dictionaries: for the environment report, for records, for
/// tuning.
#include "pybind/configs.h"

#include <pybind11/stl.h>

#include <vector>

#include "heuristics/cost_model.h"
#include "heuristics/few_tokens.h"
#include "sparse24/error.h"
#include "sparse24/linear.h"
#include "sparse24/mm.h"

namespace py = pybind11;
using namespace py::literals;

namespace sparse24::python {
namespace {

/// "divides" is the older name of "splits_last_wave", which records have.
py::dict to_dict(const GemmConfig& config) {
  return py::dict("tile"_a = name_of(config.tile), "tile_m"_a = config.tile_m, "tile_n"_a = config.tile_n,
                  "tile_k"_a = config.tile_k, "cluster_m"_a = config.cluster_m, "cluster_n"_a = config.cluster_n,
                  "swizzle"_a = config.swizzle, "raster"_a = config.raster_along_m ? "m" : "n",
                  "splits"_a = config.splits, "splits_last_wave"_a = config.splits_last_wave,
                  "divides"_a = config.splits_last_wave, "text"_a = to_string(config));
}

py::list to_list(const std::vector<GemmConfig>& configs) {
  py::list out;
  for (const GemmConfig& config : configs) out.append(to_dict(config));
  return out;
}

LinearTiles linear_tiles(const std::string& dtype, bool compress) {
  const DType t = parse_dtype(dtype);
  return compress ? linear_compress_tiles(t, t, t) : linear_relu2_tiles(t, t);
}

CostRow parse_row(const py::dict& row) {
  return {row["product"].cast<std::string>(), row["bits"].cast<int>(),     row["tile"].cast<std::string>(),
          row["field"].cast<std::string>(),   row["value"].cast<double>(), row["record"].cast<std::string>()};
}

std::vector<CostRow> parse_rows(const py::list& rows) {
  std::vector<CostRow> out;
  for (const py::handle& row : rows) out.push_back(parse_row(row.cast<py::dict>()));
  return out;
}

py::list cost_rows() {
  py::list out;
  for (const CostRow& row : measured_rows()) {
    out.append(py::dict("product"_a = row.product, "bits"_a = row.bits, "tile"_a = row.tile, "field"_a = row.field,
                        "value"_a = row.value, "record"_a = row.record));
  }
  return out;
}

py::list few_tokens() {
  py::list out;
  for (const FewTokensRow& row : few_tokens_rows()) {
    out.append(py::dict("bits"_a = row.bits, "d_model"_a = row.d_model, "d_ff"_a = row.d_ff, "tokens"_a = row.tokens,
                        "dense"_a = row.dense, "record"_a = row.record));
  }
  return out;
}

/// The cost model by rows of the caller's, of the reference device.
class PyCostModel {
 public:
  explicit PyCostModel(const py::list& rows) : costs_(costs_of(parse_rows(rows))) {}

  double predicted_us(const std::string& product, const std::string& dtype, int64_t m, int64_t n, int64_t k,
                      const py::dict& config) const {
    const GemmProblem problem = parse_problem(product, dtype, m, n, k);
    return CostModel{reference_device(), costs_}.predicted_us(problem, parse_config(problem, config));
  }
  py::dict fastest(const std::string& product, const std::string& dtype, int64_t m, int64_t n, int64_t k,
                   const py::list& configs) const {
    const GemmProblem problem = parse_problem(product, dtype, m, n, k);
    std::vector<GemmConfig> parsed;
    for (const py::handle& config : configs) parsed.push_back(parse_config(problem, config.cast<py::dict>()));
    return to_dict(sparse24::fastest({reference_device(), costs_}, problem, parsed));
  }

 private:
  static GemmProblem parse_problem(const std::string& product, const std::string& dtype, int64_t m, int64_t n,
                                   int64_t k) {
    check(product == "sparse" || product == "dense",
          "sparse24._C._CostModel: expected product to be \"sparse\" or \"dense\", got \"", product, '"');
    return {product == "sparse" ? Product::kSparse : Product::kDense, parse_dtype(dtype), m, n, k};
  }
  /// What the dictionary does not say is as in the first of all orders.
  static GemmConfig parse_config(const GemmProblem& problem, const py::dict& from) {
    const auto name = from["tile"].cast<std::string>();
    GemmConfig config{};
    const auto find = [&](const auto& specs) {
      for (const TileSpec& spec : specs) {
        if (name == name_of(spec.tile)) config = config_of(spec, problem.dtype);
      }
    };
    problem.product == Product::kSparse ? find(kSparseTiles) : find(kDenseTiles);
    check(config.tile_m > 0, "sparse24._C._CostModel: expected tile to be one of tiles.def, got \"", name, '"');
    if (from.contains("swizzle")) config.swizzle = from["swizzle"].cast<int>();
    if (from.contains("raster")) config.raster_along_m = from["raster"].cast<std::string>() == "m";
    if (from.contains("splits")) config.splits = from["splits"].cast<int>();
    for (const char* split : {"splits_last_wave", "divides"}) {
      if (from.contains(split)) config.splits_last_wave = from[split].cast<bool>();
    }
    return config;
  }

  Costs costs_;
};

}  // namespace

DType parse_dtype(const std::string& name) {
  for (DType t : {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat8E4M3}) {
    if (name == name_of(t)) return t;
  }
  fail("sparse24._C: expected dtype to be float32, float16, bfloat16 or float8_e4m3fn, got ", name);
}

void bind_configs(py::module_& module) {
  module.def(
      "mm_configs", [](const std::string& dtype) { return to_list(mm_configs(parse_dtype(dtype))); }, "dtype"_a,
      "Every configuration that select_mm_config can return for dtype, in the first of all orders.");
  module.def(
      "select_mm_config",
      [](const std::string& dtype, int64_t m, int64_t n, int64_t k, int sm_count) {
        return to_dict(select_mm_config(parse_dtype(dtype), m, n, k, sm_count));
      },
      "dtype"_a, "m"_a, "n"_a, "k"_a, "sm_count"_a,
      "The kernel that mm runs for a sparse operand [m, k] and a dense one [k, n].");
  module.def(
      "linear_configs",
      [](const std::string& dtype, bool compress) {
        return to_list(linear_configs(parse_dtype(dtype), linear_tiles(dtype, compress)));
      },
      "dtype"_a, "compress"_a, "Every configuration that select_linear_config can return, before it orders the tiles.");
  module.def(
      "select_linear_config",
      [](const std::string& dtype, int64_t m, int64_t n, int64_t k, int sm_count, bool compress) {
        return to_dict(select_linear_config(parse_dtype(dtype), m, n, k, sm_count, linear_tiles(dtype, compress)));
      },
      "dtype"_a, "m"_a, "n"_a, "k"_a, "sm_count"_a, "compress"_a,
      "How linear_compress, or else linear_relu2, runs for x [m, k] and w [n, k], all of one type.");
  module.def("cost_rows", &cost_rows, "The constants of the cost model, each with the record that it comes from.");
  module.def("few_tokens_rows", &few_tokens,
             "Up to how many tokens measured networks run as relu2_mlp_few, and beyond it as relu2_mlp_dense.");
  py::class_<PyCostModel>(module, "_CostModel", "The cost model by rows of constants, of the device of the records.")
      .def(py::init<const py::list&>(), "rows"_a)
      .def("predicted_us", &PyCostModel::predicted_us, "product"_a, "dtype"_a, "m"_a, "n"_a, "k"_a, "config"_a)
      .def("fastest", &PyCostModel::fastest, "product"_a, "dtype"_a, "m"_a, "n"_a, "k"_a, "configs"_a);
}

}  // namespace sparse24::python
