/// @file
/// The plain form of linear_compress_packed, linear_gradient_packed and linear_gradient_fp8_packed: the weight is
/// unpacked, and the ops for dense weights do the rest.
#include <cstring>
#include <vector>

#include "core/buffer.h"
#include "reference/groups.h"
#include "reference/kept.h"
#include "sparse24/packed.h"

namespace sparse24::cpu {
namespace {

/// A packed weight, and which entries it has.
struct Unpacked {
  std::vector<unsigned char> dense;
  std::vector<uint8_t> kept;  ///< [columns, rows of the operand], in the order of features
};

/// Unpacks the operand [rows, columns]. `feature(m)` is that of a row, `place(feature, k)` where an entry goes.
template <class Feature, class Place>
Unpacked unpacked(const void* values, const uint8_t* meta, DType dtype, int64_t rows, int64_t columns,
                  const Feature& feature, const Place& place) {
  const Operand a = Operand::of(rows, columns, dtype, Dim::kFeatures);
  const auto size = size_of(dtype);
  Unpacked out{make_buffer<unsigned char>(rows * columns * size), make_buffer<uint8_t>(rows * columns)};
  for_each_group(a, [&](int64_t m, int64_t g) {
    const Pair pair = read_pair(meta, a, m, g);
    for (int slot = 1; slot >= 0; --slot) {  // the first one counts if both are at the same place
      const int64_t k = 4 * g + (slot == 0 ? pair.first : pair.second);
      std::memcpy(out.dense.data() + place(feature(m), k) * size,
                  static_cast<const unsigned char*>(values) + a.value_index(m, 2 * g + slot) * size,
                  static_cast<size_t>(size));
      out.kept[static_cast<size_t>(k * rows + feature(m))] = 1;
    }
  });
  return out;
}

}  // namespace

void linear_compress_packed(const LinearCompressPackedArgs& args) {
  const LinearArgs& l = args.compress.linear;
  const auto w = unpacked(l.w, args.w_meta, l.dtype, l.out, l.in, packed_feature,
                          [&](int64_t feature, int64_t k) { return feature * l.in + k; });
  LinearCompressArgs compress = args.compress;
  compress.linear.w = w.dense.data();
  linear_compress(compress, w.kept.data());
}

void linear_gradient_packed(const LinearGradientPackedArgs& args) {
  const LinearGradientArgs& g = args.gradient;
  const auto w = unpacked(
      g.w, args.w_meta, g.dtype, g.features, g.in, [](int64_t m) { return m; },
      [&](int64_t feature, int64_t k) { return k * g.features + feature; });
  LinearGradientArgs gradient = g;
  gradient.w = w.dense.data();
  linear_gradient(gradient, w.kept.data());
}

void linear_gradient_fp8_packed(const LinearGradientFp8PackedArgs& args) {
  const LinearGradientFp8Args& g = args.gradient;
  const auto w = unpacked(
      g.w, args.w_meta, DType::kFloat8E4M3, g.features, g.in, [](int64_t m) { return m; },
      [&](int64_t feature, int64_t k) { return feature * g.in + k; });
  LinearGradientFp8Args gradient = g;
  gradient.w = w.dense.data();
  linear_gradient_fp8(gradient, w.kept.data());
}

}  // namespace sparse24::cpu
