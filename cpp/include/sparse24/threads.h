/// @file
/// How many threads the CPU functions use. Their results do not depend on it.
#pragma once

#include <cstdint>

namespace sparse24::cpu {

/// Sets how many threads, the calling one included, each later CPU function of the calling thread uses at most. 0, with
/// which every thread begins, stands for the number of cores.
void set_max_threads(int64_t threads);
int64_t max_threads();

}  // namespace sparse24::cpu
