/// @file
/// The slow, plain form of prune_pack24.
#include "sparse24/pack.h"

#include <cstring>
#include <type_traits>

#include "reference/activate.h"
#include "reference/groups.h"
#include "reference/numeric.h"

namespace sparse24::cpu {
namespace {

/// The stored form of one value: its own bits unless the type is another one.
template <class In, class Out>
typename Out::Storage stored(typename In::Storage x) {
  if constexpr (std::is_same_v<In, Out>) {
    return x;
  } else {
    return Out::round(In::load(x));
  }
}

template <class In, class Out>
void pack_as(const PrunePackArgs& args) {
  const Operand a = args.operand();
  const bool features = args.dim == Dim::kFeatures;
  const auto* w = static_cast<const typename In::Storage*>(args.w);
  auto* pruned = static_cast<typename Out::Storage*>(args.pruned);
  auto* values = static_cast<typename Out::Storage*>(args.values);
  for_each_group(a, [&](int64_t m, int64_t g) {
    const auto place = [&](int i) {
      return features ? packed_feature(m) * args.cols + 4 * g + i : (4 * g + i) * args.cols + m;
    };
    uint32_t key[4];
    for (int i = 0; i < 4; ++i) key[i] = selection_key(In::load(w[place(i)]));
    const Pair pair = select_pair(key);
    write_pair(args.meta, a, m, g, pair);
    for (int i = 0; i < 4; ++i) {
      const bool first = i == pair.first, kept = first || i == pair.second;
      const auto value = kept ? stored<In, Out>(w[place(i)]) : typename Out::Storage{};
      pruned[place(i)] = value;
      if (kept) values[a.value_index(m, 2 * g + (first ? 0 : 1))] = value;
    }
  });
}

}  // namespace

void prune_pack24(const PrunePackArgs& args) {
  std::memset(args.meta, kMetaPaddingByte, static_cast<size_t>(args.operand().meta_bytes()));
  visit_dtype(args.w_dtype, [&](auto in) {
    using In = decltype(in);
    if constexpr (std::is_same_v<In, Float32>) {
      if (args.dtype == DType::kBFloat16) return pack_as<In, BFloat16>(args);
      if (args.dtype == DType::kFloat16) return pack_as<In, Float16>(args);
    }
    pack_as<In, In>(args);
  });
}

}  // namespace sparse24::cpu
