// What GCC's -fopenmp calls, over std::thread, for ThreadSanitizer.
//
// libgomp is not instrumented: it hides its barriers from ThreadSanitizer, which then reports a race behind each of
// them. This file is linked into the module under test, compiled with -fsanitize=thread, and its symbols hide libgomp's.
// It has what csrc/ uses: parallel regions (nested ones run on one thread), barriers, static and dynamic loops. A region
// starts fresh threads, and a dynamic loop gives out its iterations in an order that differs from run to run.
#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

namespace {

struct Loop {
  long next = 0, end = 0, step = 1, chunk = 1;
  int left = 0;  // threads that came to its end
};

struct Team {
  explicit Team(int threads) : threads(threads) {}
  const int threads;
  std::mutex lock;
  std::condition_variable all_here;
  int waiting = 0;
  long round = 0;
  std::map<long, Loop> loops;  // by their number in the region; with nowait several are open at once

  void barrier() {
    std::unique_lock<std::mutex> hold(lock);
    const long mine = round;
    if (++waiting == threads) {
      waiting = 0, ++round;
      all_here.notify_all();
    } else {
      all_here.wait(hold, [&] { return round != mine; });
    }
  }
};

thread_local Team* team = nullptr;
thread_local int number = 0;
thread_local long loop = 0;  // of the region, the one that this thread is in

int most_threads() {
  const char* wanted = std::getenv("LDMFAST_SANITIZE_THREADS");
  return wanted ? std::max(1, std::atoi(wanted)) : 4;
}

bool take(long* first, long* last) {
  if (!team) std::abort();  // a loop outside of a region
  std::lock_guard<std::mutex> hold(team->lock);
  Loop& l = team->loops[loop];
  if (l.next >= l.end) return false;
  *first = l.next;
  *last = l.next = std::min(l.end, l.next + l.chunk * l.step);
  return true;
}

bool start(long first, long end, long step, long chunk, long* mine, long* last) {
  if (step <= 0) std::abort();
  {
    std::lock_guard<std::mutex> hold(team->lock);
    team->loops.try_emplace(++loop, Loop{first, end, step, std::max(chunk, 1L), 0});
  }
  return take(mine, last);
}

void leave() {
  std::lock_guard<std::mutex> hold(team->lock);
  const auto at = team->loops.find(loop);
  if (++at->second.left == team->threads) team->loops.erase(at);
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("hidden")))

EXPORTED int omp_get_thread_num() { return number; }
EXPORTED int omp_get_num_threads() { return team ? team->threads : 1; }
EXPORTED int omp_get_max_threads() { return most_threads(); }

EXPORTED void GOMP_barrier() {
  static const bool none = std::getenv("LDMFAST_SANITIZE_NO_BARRIER");  // so that races are seen to be reported
  if (team && !none) team->barrier();
}

EXPORTED void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  Team* const outer = team;
  const int outer_number = number;
  const long outer_loop = loop;
  Team mine(outer ? 1 : threads ? int(threads) : most_threads());
  const auto run = [&](int i) {
    team = &mine, number = i, loop = 0;
    body(data);
  };
  std::vector<std::thread> others;
  for (int i = 1; i < mine.threads; ++i) others.emplace_back(run, i);
  run(0);
  for (std::thread& other : others) other.join();
  team = outer, number = outer_number, loop = outer_loop;
}

EXPORTED bool GOMP_loop_dynamic_start(long first, long end, long step, long chunk, long* mine, long* last) {
  return start(first, end, step, chunk, mine, last);
}
EXPORTED bool GOMP_loop_dynamic_next(long* mine, long* last) { return take(mine, last); }
EXPORTED bool GOMP_loop_nonmonotonic_dynamic_start(long first, long end, long step, long chunk, long* mine, long* last) {
  return start(first, end, step, chunk, mine, last);
}
EXPORTED bool GOMP_loop_nonmonotonic_dynamic_next(long* mine, long* last) { return take(mine, last); }
EXPORTED void GOMP_loop_end_nowait() { leave(); }
EXPORTED void GOMP_loop_end() {
  leave();
  team->barrier();
}
