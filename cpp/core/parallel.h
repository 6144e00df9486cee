/// @file
/// parallel_for over independent rows: which thread computes a row never changes its result.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <functional>
#include <thread>
#include <vector>

#include "sparse24/threads.h"
#include "sparse24/types.h"

namespace sparse24 {

/// Calls `body(begin, end)` for consecutive ranges that cover [0, count).
///
/// `work_per_item` counts elementary operations; small jobs stay on the calling thread, since starting one costs more.
/// There are at most `cpu::max_threads()` ranges. Those whose thread cannot start, as at a limit of processes, run on
/// the calling thread. `body` must not throw.
template <class Body>
void parallel_for(int64_t count, int64_t work_per_item, const Body& body) {
  constexpr int64_t kWorkPerThread = 1 << 18;
  const int64_t work = count * std::max<int64_t>(work_per_item, 1);
  const int64_t threads = std::min({cpu::max_threads(), count, work / kWorkPerThread});
  if (threads <= 1) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
  const int64_t share = ceil_div(count, threads);
  std::vector<std::thread> others;
  int64_t begin = share;
  try {
    others.reserve(static_cast<size_t>(threads));
    for (; begin < count; begin += share) others.emplace_back(std::cref(body), begin, std::min(begin + share, count));
  } catch (const std::exception&) {  // no thread, or no memory for one
  }
  body(int64_t{0}, std::min(share, count));
  if (begin < count) body(begin, count);
  for (std::thread& other : others) other.join();
}

}  // namespace sparse24
