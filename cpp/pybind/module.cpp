/// @file
/// sparse24._C: what was built, the choice of GEMM configuration, and the metadata format on NumPy arrays. No torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "pybind/configs.h"
#include "pybind/unchanged.h"
#include "sparse24/device.h"
#include "sparse24/error.h"
#include "sparse24/format.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using sparse24::Dim;
using sparse24::DType;
using sparse24::Operand;

/// C-contiguous bytes; other integer arrays and layouts are converted by pybind11.
using Bytes = py::array_t<uint8_t, py::array::c_style | py::array::forcecast>;

using sparse24::python::parse_dtype;

Operand parse_operand(int64_t rows, int64_t cols, const std::string& dtype, int dim) {
  sparse24::check(dim == -1 || dim == -2, "sparse24._C: expected dim to be -1 or -2, got ", dim);
  sparse24::check(rows >= 0 && cols >= 0, "sparse24._C: expected rows and cols to be at least 0, got ", rows, " and ",
                  cols);
  return Operand::of(rows, cols, parse_dtype(dtype), dim == -1 ? Dim::kFeatures : Dim::kTokens);
}

int64_t groups_of(const Operand& a) { return sparse24::ceil_div(a.k, 4); }

/// What the sizes of X and of what is stored for it are multiples of.
py::dict multiples(const std::string& dtype) {
  const DType t = parse_dtype(dtype);
  return py::dict("features"_a = sparse24::feature_alignment(t, Dim::kFeatures),
                  "features_of_tokens"_a = sparse24::feature_alignment(t, Dim::kTokens),
                  "tokens"_a = sparse24::token_padding(t), "meta_rows"_a = sparse24::kMetaRowPadding,
                  "meta_columns"_a = sparse24::meta_atom_k(t));
}

int64_t meta_bytes(int64_t rows, int64_t cols, const std::string& dtype, int dim) {
  return parse_operand(rows, cols, dtype, dim).meta_bytes();
}

Bytes unpack_meta(const Bytes& meta, int64_t rows, int64_t cols, const std::string& dtype, int dim) {
  const Operand a = parse_operand(rows, cols, dtype, dim);
  sparse24::check(meta.size() == a.meta_bytes(), "sparse24._C.unpack_meta: expected meta to have ", a.meta_bytes(),
                  " elements, got ", meta.size());
  Bytes nibbles({a.m, groups_of(a)});
  const uint8_t* packed = meta.data();
  auto out = nibbles.mutable_unchecked<2>();
  for (int64_t m = 0; m < a.m; ++m) {
    for (int64_t g = 0; g < groups_of(a); ++g) {
      out(m, g) = packed[a.meta_byte(m, g)] >> Operand::meta_shift(g) & 0xF;
    }
  }
  return nibbles;
}

Bytes pack_meta(const Bytes& nibbles, int64_t rows, int64_t cols, const std::string& dtype, int dim) {
  const Operand a = parse_operand(rows, cols, dtype, dim);
  sparse24::check(nibbles.ndim() == 2 && nibbles.shape(0) == a.m && nibbles.shape(1) == groups_of(a),
                  "sparse24._C.pack_meta: expected nibbles to have shape (", a.m, ", ", groups_of(a), ")");
  Bytes meta(a.meta_bytes());
  uint8_t* packed = meta.mutable_data();
  std::fill(packed, packed + a.meta_bytes(), sparse24::kMetaPaddingByte);
  const auto in = nibbles.unchecked<2>();
  for (int64_t m = 0; m < a.m; ++m) {
    for (int64_t g = 0; g < groups_of(a); ++g) {
      const int nibble = in(m, g), first = nibble & 3, second = nibble >> 2;
      sparse24::check(first < second && second < 4,
                      "sparse24._C.pack_meta: expected nibbles i0 | i1 << 2 with i0 < i1 < 4, got ", nibble);
      uint8_t& byte = packed[a.meta_byte(m, g)];
      const int shift = Operand::meta_shift(g);
      byte = static_cast<uint8_t>((byte & ~(0xF << shift)) | nibble << shift);
    }
  }
  return meta;
}

py::dict build_info() {
  const sparse24::BuildInfo info = sparse24::build_info();
  return py::dict("version"_a = info.version, "cuda"_a = info.cuda, "cuda_archs"_a = info.cuda_archs,
                  "cuda_version"_a = info.cuda_version, "cutlass"_a = info.cutlass, "compiler"_a = info.compiler,
                  "torch_target"_a = info.torch_target);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Build facts, GEMM configurations and the metadata format of sparse24.";
  module.attr("version") = sparse24::build_info().version;
  module.def("build_info", &build_info, "Facts fixed at compile time.");
  sparse24::python::bind_configs(module);
  sparse24::python::bind_unchanged(module);
  module.attr("largest_e4m3") = sparse24::kLargestE4M3;
  module.def(
      "multiples", &multiples, "dtype"_a,
      "Of X with values of dtype: columns with groups along features, and along tokens; tokens of the values, rows "
      "and columns of the metadata, which are padded.");
  module.def("meta_bytes", &meta_bytes, "rows"_a, "cols"_a, "dtype"_a, "dim"_a = -1,
             "Bytes of metadata of X [rows, cols] with values of dtype.");
  module.def("unpack_meta", &unpack_meta, "meta"_a, "rows"_a, "cols"_a, "dtype"_a, "dim"_a = -1,
             "Nibbles [M, ceil(K / 4)] of the sparse operand in natural order, without the padding.");
  module.def("pack_meta", &pack_meta, "nibbles"_a, "rows"_a, "cols"_a, "dtype"_a, "dim"_a = -1,
             "The inverse of unpack_meta; padding is filled in.");
}
