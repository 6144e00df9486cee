/// @file
/// The slow, plain form of compress, compress_like and decompress: what the kernels are compared with, bit for bit.
#include "sparse24/compress.h"

#include <cstring>

#include "reference/activate.h"
#include "reference/groups.h"
#include "reference/numeric.h"
#include "sparse24/quantize.h"

namespace sparse24::cpu {
namespace {

/// Says where the sparse operand A [m, k] finds its elements in X [rows, cols].
struct Source {
  Operand a;
  int64_t cols;
  int64_t operator()(int64_t m, int64_t k) const { return a.dim == Dim::kFeatures ? m * cols + k : k * cols + m; }
};

/// The stored form of one 16-bit or fp32 value: X's own bits unless the activation computed a new number.
template <class In>
typename In::Storage keep(typename In::Storage x, float y, Activation activation) {
  using Storage = typename In::Storage;
  if (activation == Activation::kRelu2) return In::round(y);
  if (activation == Activation::kRelu && y == 0.0f) return Storage{0};
  return x;
}

template <class In, bool kQuantize>
void compress_as(const CompressArgs& args) {
  using Storage = typename In::Storage;
  const Operand a = Operand::of(args.rows, args.cols, args.values_dtype, args.dim);
  const Source source{a, args.cols};
  const auto* x = static_cast<const Storage*>(args.x);

  const float* scale = args.given_scale;
  if (kQuantize && scale == nullptr) {
    write_scales(args.dim == Dim::kFeatures ? row_amax<In>(x, args.rows, args.cols, args.activation)
                                            : column_amax<In>(x, args.rows, args.cols, args.activation),
                 args.scaling, args.computed_scale);
    scale = args.computed_scale;
  }

  for_each_group(a, [&](int64_t m, int64_t g) {
    Storage raw[4] = {};
    float y[4];
    uint32_t key[4];
    for (int i = 0; i < 4; ++i) {
      if (4 * g + i < a.k) raw[i] = x[source(m, 4 * g + i)];
      y[i] = args.activation.value(In::load(raw[i]));
      key[i] = selection_key(args.activation.root(In::load(raw[i])));
    }
    const Pair pair = select_pair(key);
    write_pair(args.meta, a, m, g, pair);
    for (int slot = 0; slot < 2; ++slot) {
      const int i = slot == 0 ? pair.first : pair.second;
      const int64_t at = a.value_index(m, 2 * g + slot);
      if constexpr (kQuantize) {
        const float inverse = 1.0f / usable_scale(scale[args.scaling == Scaling::kRow ? m : 0]);
        static_cast<uint8_t*>(args.values)[at] = float_to_e4m3(y[i] * inverse);
      } else {
        static_cast<Storage*>(args.values)[at] = keep<In>(raw[i], y[i], args.activation.kind);
      }
    }
  });
}

template <class Storage>
void compress_like_as(const CompressLikeArgs& args) {
  const Operand a = Operand::of(args.rows, args.cols, args.dtype, args.dim);
  const Source source{a, args.cols};
  const auto* x = static_cast<const Storage*>(args.x);
  auto* values = static_cast<Storage*>(args.values);
  for_each_group(a, [&](int64_t m, int64_t g) {
    const Pair pair = read_pair(args.meta, a, m, g);
    const int64_t k[2] = {4 * g + pair.first, 4 * g + pair.second};
    for (int slot = 0; slot < 2; ++slot) {
      values[a.value_index(m, 2 * g + slot)] = k[slot] < a.k ? x[source(m, k[slot])] : Storage{0};
    }
  });
}

template <class Storage>
void decompress_as(const DecompressArgs& args) {
  const Operand a = Operand::of(args.rows, args.cols, args.dtype, args.dim);
  const Source source{a, args.cols};
  const auto* values = static_cast<const Storage*>(args.values);
  auto* x = static_cast<Storage*>(args.x);
  std::memset(x, 0, static_cast<size_t>(args.rows * args.cols) * sizeof(Storage));
  for_each_group(a, [&](int64_t m, int64_t g) {
    const Pair pair = read_pair(args.meta, a, m, g);
    const int64_t k[2] = {4 * g + pair.first, 4 * g + pair.second};
    for (int slot = 1; slot >= 0; --slot) {  // the first one counts if both are at the same place
      if (k[slot] < a.k) x[source(m, k[slot])] = values[a.value_index(m, 2 * g + slot)];
    }
  });
}

/// Calls `function` with an unsigned integer of the size of `dtype`, to move elements without a look at them.
template <class Function>
void visit_size(DType dtype, Function&& function) {
  switch (size_of(dtype)) {
    case 1: return function(uint8_t{});
    case 2: return function(uint16_t{});
    default: return function(uint32_t{});
  }
}

}  // namespace

void compress(const CompressArgs& args) {
  const Operand a = Operand::of(args.rows, args.cols, args.values_dtype, args.dim);
  std::memset(args.meta, kMetaPaddingByte, static_cast<size_t>(a.meta_bytes()));  // what no group covers stays so
  visit_dtype(args.x_dtype, [&](auto in) {
    using In = decltype(in);
    if (args.values_dtype == DType::kFloat8E4M3) {
      compress_as<In, true>(args);
    } else {
      compress_as<In, false>(args);
    }
  });
}

void compress_like(const CompressLikeArgs& args) {
  visit_size(args.dtype, [&](auto element) { compress_like_as<decltype(element)>(args); });
}

void decompress(const DecompressArgs& args) {
  visit_size(args.dtype, [&](auto element) { decompress_as<decltype(element)>(args); });
}

}  // namespace sparse24::cpu
