// An Executor for a C++ compiler: it runs every phase of a block one thread after another, and the blocks of a cluster
// concurrently. It checks every access and fills shared memory with NaN. ThreadSanitizer finds races between blocks in
// it; races within a block are not found.
#pragma once

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <mutex>
#include <vector>

#include "grid.h"

namespace cudfast {
namespace {

// The shared state of the blocks of a cluster.
class Cluster {
 public:
  const Grid grid;
  const int first;  // block
  std::vector<std::vector<double>> memory;

  Cluster(const Grid& of, int first_block)
      : grid(of),
        first(first_block),
        memory(static_cast<size_t>(of.cluster),
               std::vector<double>(static_cast<size_t>(kHeaderBytes + of.staged) / sizeof(double), NAN)) {}

  void join() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int round = round_;
    if (++waiting_ < grid.cluster) return all_.wait(lock, [&] { return round_ != round; });
    waiting_ = 0;
    ++round_;
    all_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_;
  int waiting_ = 0, round_ = 0;
};

class Executor {
 public:
  template <class T>
  class Local {
   public:
    explicit Local(const Executor& x) : values_(static_cast<size_t>(x.threads())) {}
    T& operator[](Thread th) { return values_.at(static_cast<size_t>(th.index)); }

   private:
    std::vector<T> values_;
  };

  Executor(Cluster& all, int rank) : all_(all), rank_(rank) {}
  int threads() const { return all_.grid.threads; }
  int cluster() const { return all_.grid.cluster; }
  int rank() const { return rank_; }
  int block(int rank) const { return all_.first + rank; }

  template <class F>
  void each(F f) {
    for (int index = 0; index < threads(); ++index) f(Thread{rank_, index});
  }
  void join() { all_.join(); }

  template <class T>
  T& shared(int rank) {
    static_assert(sizeof(T) <= kHeaderBytes - kScratchBytes, "does not fit");
    return *reinterpret_cast<T*>(bytes(rank) + kScratchBytes);
  }
  char* staged(Thread th, int offset, int size) {
    CUDFAST_CHECK(offset >= 0 && offset % 16 == 0 && offset + size <= all_.grid.staged);
    return bytes(th.rank) + kHeaderBytes + offset;
  }

  template <class T, class Add>
  void reduce(Local<T>& values, Add add, const T& empty = T{}) {
    T warps[kWarp];
    std::fill(warps, warps + kWarp, empty);
    for (int warp = 0; warp < threads() / kWarp; ++warp) {
      T lanes[kWarp];
      for (int lane = 0; lane < kWarp; ++lane) lanes[lane] = values[Thread{rank_, warp * kWarp + lane}];
      warps[warp] = of_warp(lanes, add);
    }
    const T total = of_warp(warps, add);
    for (int index = 0; index < threads(); ++index) values[Thread{rank_, index}] = total;
  }

 private:
  char* bytes(int rank) { return reinterpret_cast<char*>(all_.memory.at(static_cast<size_t>(rank)).data()); }
  template <class T, class Add>
  static T of_warp(T (&lanes)[kWarp], Add add) {
    for (int down = kWarp / 2; down > 0; down /= 2) {
      for (int lane = 0; lane < down; ++lane) lanes[lane] = add(lanes[lane], lanes[lane + down]);
    }
    return lanes[0];
  }

  Cluster& all_;
  int rank_;
};

}  // namespace
}  // namespace cudfast
