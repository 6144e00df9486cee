/// @file
/// The slow, plain form of quantize_fp8_both and transpose_fp8.
#include "sparse24/quantize_both.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/buffer.h"
#include "core/parallel.h"
#include "reference/activate.h"
#include "reference/groups.h"
#include "reference/numeric.h"

namespace sparse24::cpu {
namespace {

/// Returns x with zeros where nothing is kept, and writes which places are, if they are asked for.
template <class In>
std::vector<typename In::Storage> pruned(const QuantizeBothArgs& args) {
  const auto* x = static_cast<const typename In::Storage*>(args.x);
  auto out = make_buffer<typename In::Storage>(args.rows * args.cols);
  if (args.meta) std::memset(args.meta, kMetaPaddingByte, static_cast<size_t>(args.packed().meta_bytes()));
  const Operand a = Operand::of(args.rows, args.cols, args.x_dtype, args.dim);
  const bool features = args.dim == Dim::kFeatures;
  for_each_group(a, [&](int64_t m, int64_t g) {
    const auto place = [&](int i) { return features ? m * args.cols + 4 * g + i : (4 * g + i) * args.cols + m; };
    uint32_t key[4];
    for (int i = 0; i < 4; ++i) key[i] = selection_key(In::load(x[place(i)]));
    const Pair pair = select_pair(key);
    for (int i : {pair.first, pair.second}) out[static_cast<size_t>(place(i))] = x[place(i)];
    if (args.meta) write_pair(args.meta, args.packed(), features ? packed_row(m) : m, g, pair);
  });
  return out;
}

template <class In>
void quantize_as(const QuantizeBothArgs& args) {
  const auto* x = static_cast<const typename In::Storage*>(args.x);
  auto *q = static_cast<uint8_t*>(args.q), *qt = static_cast<uint8_t*>(args.qt);
  const auto amax = row_amax<In>(x, args.rows, args.cols, Activation::kNone);
  if (!amax.empty()) *args.amax = *std::max_element(amax.begin(), amax.end());
  *args.scale = args.given_scale ? usable_scale(*args.given_scale) : scale_of_amax(*args.amax);
  const float inverse = 1.0f / *args.scale;
  const auto kept = args.prunes ? pruned<In>(args) : std::vector<typename In::Storage>{};
  if (args.prunes) x = kept.data();
  const int64_t ld = args.ld_qt();
  const bool packs_columns = args.meta && args.dim == Dim::kFeatures, packs_rows = args.meta && !packs_columns;
  parallel_for(ld, args.cols, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t row = interleaved_token(r, args.quarter());
      for (int64_t c = 0; c < args.cols; ++c) {
        const uint8_t code = r < args.rows ? float_to_e4m3(In::load(x[row * args.cols + c]) * inverse) : 0;
        if (r < args.rows && !packs_columns) (packs_rows ? qt : q)[row * args.cols + c] = code;
        if (!packs_rows) qt[c * ld + r] = code;
      }
    }
  });
  if (!args.meta) return;
  const Operand a = args.packed();
  for_each_group(a, [&](int64_t m, int64_t g) {
    const Pair pair = read_pair(args.meta, a, m, g);
    const auto code = [&](int i) {
      return packs_rows ? qt[(4 * g + i) * args.cols + m] : qt[(4 * g + i) * ld + packed_feature(m)];
    };
    q[a.value_index(m, 2 * g)] = code(pair.first);
    q[a.value_index(m, 2 * g + 1)] = code(pair.second);
  });
}

}  // namespace

void quantize_fp8_both(const QuantizeBothArgs& args) {
  visit_dtype(args.x_dtype, [&](auto in) {
    for (int64_t i = 0; i < args.count; ++i) quantize_as<decltype(in)>(args.matrix(i, size_of(args.x_dtype)));
  });
}

void transpose_fp8(const TransposeFp8Args& args) {
  const auto* q = static_cast<const uint8_t*>(args.q);
  auto* qt = static_cast<uint8_t*>(args.qt);
  const int64_t ld = args.ld_qt();
  parallel_for(args.cols, ld, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t r = 0; r < ld; ++r) qt[c * ld + r] = r < args.rows ? q[r * args.cols + c] : uint8_t{0};
    }
  });
}

}  // namespace sparse24::cpu
