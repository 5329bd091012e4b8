// Memory that nobody has touched yet: 4 KiB page faults would cost as much as the arithmetic that fills it.
#pragma once

#include <sys/mman.h>

#include <cstdint>

namespace cudfast {
namespace {

// Asks for huge pages under [begin, end).
inline void ask_for_huge_pages(const char* begin, const char* end) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t(1) << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page;
  const uintptr_t last = reinterpret_cast<uintptr_t>(end) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)begin;
  (void)end;
#endif
}

}  // namespace
}  // namespace cudfast
