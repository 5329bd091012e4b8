// A pool of memory for logits and gradients: the first access to new pages takes as long as the arithmetic.
//
// A freed block stays mapped, and the next block of about its size reuses its pages: no faults, no zeroing. Meanwhile
// the operating system may take the pages (MADV_FREE); then they are faulted in again.
#pragma once

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <list>
#include <mutex>
#include <new>

namespace cudfast {

struct Block {
  void* data = nullptr;
  size_t bytes = 0;  // size of the mapping
};

class Pool {
 public:
  // Never destroyed: tensors may be freed after the static objects of a process.
  static Pool& instance() {
    static Pool* const pool = new Pool;
    return *pool;
  }

  // At least `bytes`; the contents are arbitrary.
  Block take(size_t bytes) {
    const size_t size = (std::max<size_t>(bytes, 1) + page_ - 1) / page_ * page_;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      auto best = kept_.end();
      for (auto it = kept_.begin(); it != kept_.end(); ++it) {
        const bool fits = it->bytes >= size && it->bytes - size <= size / 4;
        if (fits && (best == kept_.end() || it->bytes < best->bytes)) best = it;
      }
      if (best != kept_.end()) {
        const Block found = *best;
        kept_.erase(best);
        return found;
      }
    }
    return map(size);
  }

  void give(Block block) {
#if defined(MADV_FREE)
    const std::lock_guard<std::mutex> lock(mutex_);
    if (block.bytes <= limit_ && madvise(block.data, block.bytes, MADV_FREE) == 0) {
      kept_.push_front(block);
      shrink(limit_, kMost);
      return;
    }
#endif
    munmap(block.data, block.bytes);
  }

  // Returns all unused blocks to the operating system.
  void clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    shrink(0, 0);
  }

  // Sets the largest number of unused bytes; 0: no block is kept.
  void limit(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    limit_ = bytes;
    shrink(limit_, kMost);
  }

  // Unused bytes.
  size_t kept() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return total();
  }

 private:
  static constexpr size_t kHuge = size_t(1) << 21;
  static constexpr size_t kMost = 16;  // blocks

  Pool() {
    const long pages = sysconf(_SC_PHYS_PAGES);
    if (pages > 0) limit_ = static_cast<size_t>(pages) * page_ / 4;
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] { instance().mutex_.unlock(); });
  }

  // In huge pages if the system has them, and small ones at the end, so that only the requested bytes become resident.
  static Block map(size_t size) {
    const size_t wide = size + kHuge;
    void* const found = mmap(nullptr, wide, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED) throw std::bad_alloc();
    char* const begin = static_cast<char*>(found);
    const size_t head = (kHuge - reinterpret_cast<uintptr_t>(begin) % kHuge) % kHuge;
    if (head) munmap(begin, head);
    if (wide - head > size) munmap(begin + head + size, wide - head - size);
#if defined(MADV_HUGEPAGE)
    madvise(begin + head, size, MADV_HUGEPAGE);
#endif
    return {begin + head, size};
  }

  size_t total() const {
    size_t sum = 0;
    for (const Block& block : kept_) sum += block.bytes;
    return sum;
  }

  // Unmaps the blocks that have been unused longest first.
  void shrink(size_t bytes, size_t count) {
    while (!kept_.empty() && (kept_.size() > count || total() > bytes)) {
      munmap(kept_.back().data, kept_.back().bytes);
      kept_.pop_back();
    }
  }

  std::mutex mutex_;
  std::list<Block> kept_;  // unused blocks, the most recent first
  size_t limit_ = 0;       // bytes: a quarter of the machine's memory
  const size_t page_ = static_cast<size_t>(sysconf(_SC_PAGESIZE));
};

}  // namespace cudfast
