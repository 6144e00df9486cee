/// @file
/// The plain form of linear_compress_packed and linear_gradient_packed: the weight is unpacked, and the ops for dense
/// weights do the rest.
#include <cstring>
#include <vector>

#include "core/buffer.h"
#include "core/parallel.h"
#include "sparse24/compress.h"
#include "sparse24/packed.h"

namespace sparse24::cpu {
namespace {

/// Returns the weight [rows, columns] with its rows as they are packed.
std::vector<unsigned char> decompressed(const void* values, const uint8_t* meta, DType dtype, int64_t rows,
                                        int64_t columns) {
  auto out = make_buffer<unsigned char>(rows * columns * size_of(dtype));
  decompress({values, meta, dtype, rows, columns, Dim::kFeatures, out.data()});
  return out;
}

/// Moves elements of `size` bytes of a matrix [rows, columns] to where `place(row, column)` says.
template <class Place>
std::vector<unsigned char> moved(const std::vector<unsigned char>& from, int64_t rows, int64_t columns, int64_t size,
                                 const Place& place) {
  auto out = make_buffer<unsigned char>(rows * columns * size);
  parallel_for(rows, columns, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t c = 0; c < columns; ++c)
        std::memcpy(out.data() + place(r, c) * size, from.data() + (r * columns + c) * size, static_cast<size_t>(size));
    }
  });
  return out;
}

}  // namespace

void linear_compress_packed(const LinearCompressPackedArgs& args) {
  const LinearArgs& l = args.compress.linear;
  const auto packed = decompressed(l.w, args.w_meta, l.dtype, l.out, l.in);
  const auto dense =
      moved(packed, l.out, l.in, size_of(l.dtype), [&](int64_t m, int64_t k) { return packed_feature(m) * l.in + k; });
  LinearCompressArgs compress = args.compress;
  compress.linear.w = dense.data();
  linear_compress(compress);
}

void linear_gradient_packed(const LinearGradientPackedArgs& args) {
  const LinearGradientArgs& g = args.gradient;
  const auto transposed = decompressed(g.w, args.w_meta, g.dtype, g.features, g.in);
  const auto dense = moved(transposed, g.features, g.in, size_of(g.dtype),
                           [&](int64_t feature, int64_t k) { return k * g.features + feature; });
  LinearGradientArgs gradient = g;
  gradient.w = dense.data();
  linear_gradient(gradient);
}

}  // namespace sparse24::cpu
