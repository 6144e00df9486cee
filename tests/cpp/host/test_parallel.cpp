/// @file
/// parallel_for: every index once, on as many threads as are allowed, and on fewer where one cannot start.
#include <dlfcn.h>
#include <gtest/gtest.h>
#include <pthread.h>

#include <atomic>
#include <cerrno>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "core/parallel.h"

namespace {

/// Threads that may still start; negative: any number.
std::atomic<int> threads_left{-1};

}  // namespace

/// What std::thread calls, as at a limit of processes once `threads_left` have started.
extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*function)(void*),
                              void* argument) noexcept {
  using Create = int (*)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
  static const auto real = reinterpret_cast<Create>(dlsym(RTLD_NEXT, "pthread_create"));
  if (threads_left == 0) return EAGAIN;
  if (threads_left > 0) --threads_left;
  return real(thread, attributes, function, argument);
}

namespace sparse24::test {
namespace {

constexpr int64_t kPlenty = 1 << 20;  // of work: each item is worth a thread

/// How often each of `count` items was visited, and by how many threads.
struct Visits {
  std::vector<int> of_item;
  size_t threads;
};

Visits visit(int64_t count, int64_t max_threads, int may_start = -1) {
  cpu::set_max_threads(max_threads);
  threads_left = may_start;
  std::vector<std::atomic<int>> visits(static_cast<size_t>(count));
  std::mutex mutex;
  std::set<std::thread::id> threads;
  parallel_for(count, kPlenty, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) ++visits[static_cast<size_t>(i)];
    const std::lock_guard<std::mutex> lock(mutex);
    threads.insert(std::this_thread::get_id());
  });
  threads_left = -1;
  cpu::set_max_threads(0);
  return {{visits.begin(), visits.end()}, threads.size()};
}

TEST(ParallelFor, VisitsEveryItemOnceOnAsManyThreadsAsAreAllowed) {
  for (int64_t max_threads : {1, 2, 3, 8}) {
    for (int64_t count : {0, 1, 2, 7, 8, 9, 64}) {
      const Visits visits = visit(count, max_threads);
      EXPECT_EQ(visits.of_item, std::vector<int>(static_cast<size_t>(count), 1)) << max_threads << ' ' << count;
      EXPECT_LE(visits.threads, static_cast<size_t>(max_threads));
    }
  }
  EXPECT_EQ(visit(8, 8).threads, 8u);
}

TEST(ParallelFor, TheCallingThreadDoesWhatNoThreadStartsFor) {
  for (int may_start : {0, 1, 2, 6}) {
    const Visits visits = visit(64, 8, may_start);
    EXPECT_EQ(visits.of_item, std::vector<int>(64, 1)) << may_start;
    EXPECT_EQ(visits.threads, static_cast<size_t>(may_start) + 1);
  }
}

TEST(ParallelFor, TheLimitIsOfTheThreadThatSetsIt) {
  const int64_t before = cpu::max_threads();
  cpu::set_max_threads(3);
  EXPECT_EQ(cpu::max_threads(), 3);
  int64_t elsewhere = 0;
  std::thread([&] { elsewhere = cpu::max_threads(); }).join();
  EXPECT_EQ(elsewhere, before);
  cpu::set_max_threads(0);
  EXPECT_EQ(cpu::max_threads(), before);
}

}  // namespace
}  // namespace sparse24::test
