/// @file
/// The reference of gather_features.
#include "sparse24/gather_features.h"

#include "reference/groups.h"
#include "reference/numeric.h"

namespace sparse24::cpu {
namespace {

/// Elements are moved and never looked at. `nan` is what stands for NaN in their type.
template <class Storage>
void gather(const GatherFeaturesArgs& args, Storage nan) {
  const auto* values = static_cast<const Storage*>(args.values);
  auto* out = static_cast<Storage*>(args.out);
  const Operand pattern = args.pattern();
  parallel_for(args.a.m, args.count, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      for (int64_t h = 0; h < args.count; ++h) {
        const int64_t feature = args.features[h], g = feature / 4;
        Storage& to = out[m * args.count + h];
        if (feature < 0 || feature >= args.a.k) {
          to = nan;
          continue;
        }
        const Pair pair = read_pair(args.meta, pattern, m, g);
        to = feature % 4 == pair.first    ? values[args.a.value_index(m, 2 * g)]
             : feature % 4 == pair.second ? values[args.a.value_index(m, 2 * g + 1)]
                                          : Storage{0};
      }
    }
  });
}

}  // namespace

void gather_features(const GatherFeaturesArgs& args) {
  switch (size_of(args.a.dtype)) {
    case 1: return gather<uint8_t>(args, kNanE4M3);
    case 2: return gather<uint16_t>(args, kNan16);
    default: return gather<uint32_t>(args, kNanFloat32);
  }
}

}  // namespace sparse24::cpu
