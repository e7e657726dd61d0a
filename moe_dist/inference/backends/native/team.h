// Threads that go through a list of short phases together: to wait for each other takes them less
// than to be called anew.
#pragma once

#include <ATen/Parallel.h>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include <algorithm>
#include <atomic>

namespace moe_dist {

struct Member {
  int64_t number, of;

  // Call `function` with each of this member's part of [0, count), which lie one after the other.
  template <typename Function>
  void share(int64_t count, Function&& function) const {
    const int64_t first = count * number / of, last = count * (number + 1) / of;
    for (int64_t i = first; i < last; ++i) function(i);
  }

  // Wait for the others.
  void meet() const {
#if defined(_OPENMP)
#pragma omp barrier
#endif
  }
};

// Call `function(Member)` in as many threads as torch has; it must not throw.
template <typename Function>
void in_team(Function&& function) {
#if defined(_OPENMP)
#pragma omp parallel num_threads(at::get_num_threads()) if (!at::in_parallel_region())
  function(Member{omp_get_thread_num(), omp_get_num_threads()});
#else
  function(Member{0, 1});
#endif
}

// Threads take the numbers of [0, count) as they get to them: call `work(take)` in each, where `take`
// gives the next number, or `count` and more when none is left.
template <typename Work>
void take_turns(int64_t count, Work&& work) {
  std::atomic<int64_t> next = 0;
  const int64_t threads = std::min<int64_t>(count, at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) { work([&] { return next++; }); });
}

}  // namespace moe_dist
