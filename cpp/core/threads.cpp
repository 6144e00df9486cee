#include "sparse24/threads.h"

#include <algorithm>
#include <thread>

namespace sparse24::cpu {
namespace {

thread_local int64_t chosen = 0;

}  // namespace

void set_max_threads(int64_t threads) { chosen = threads; }

int64_t max_threads() { return chosen > 0 ? chosen : std::max<int64_t>(std::thread::hardware_concurrency(), 1); }

}  // namespace sparse24::cpu
