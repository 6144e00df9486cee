/// @file
/// parallel_for over independent rows: which thread computes a row never changes its result.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#include "sparse24/types.h"

namespace sparse24 {

/// Calls `body(begin, end)` for consecutive ranges that cover [0, count).
///
/// `work_per_item` counts elementary operations; small jobs stay on the calling thread, since starting one costs more.
/// `body` must not throw.
template <class Body>
void parallel_for(int64_t count, int64_t work_per_item, const Body& body) {
  constexpr int64_t kWorkPerThread = 1 << 18;
  const int64_t work = count * std::max<int64_t>(work_per_item, 1);
  const int64_t cores = std::max<int64_t>(std::thread::hardware_concurrency(), 1);
  const int64_t threads = std::min({cores, count, work / kWorkPerThread});
  if (threads <= 1) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
  const int64_t share = ceil_div(count, threads);
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(threads));
  for (int64_t begin = share; begin < count; begin += share) {
    others.emplace_back(std::cref(body), begin, std::min(begin + share, count));
  }
  body(int64_t{0}, std::min(share, count));
  for (std::thread& other : others) other.join();
}

}  // namespace sparse24
