/// @file
/// The reference of put_features.
#include "sparse24/put_features.h"

#include "reference/numeric.h"

namespace sparse24::cpu {
namespace {

template <class T>
void put(const PutFeaturesArgs& args) {
  const auto* parts = static_cast<const typename T::Storage*>(args.parts);
  auto* out = static_cast<typename T::Storage*>(args.out);
  const int64_t part = args.parts_rows() * args.parts_columns();
  for (int64_t i = 0; i < part; ++i) {
    const int64_t row = i / args.parts_columns(), column = i % args.parts_columns();
    const int64_t feature = args.features[args.by_columns ? column : row];
    if (feature < 0 || feature >= args.limit()) continue;
    float sum = 0;
    for (int64_t p = 0; p < args.part_count; ++p) sum += T::load(parts[p * part + i]);
    out[args.by_columns ? row * args.columns + feature : feature * args.columns + column] = T::round(sum);
  }
}

}  // namespace

void put_features(const PutFeaturesArgs& args) {
  visit_dtype(args.dtype, [&](auto type) { put<decltype(type)>(args); });
}

}  // namespace sparse24::cpu
