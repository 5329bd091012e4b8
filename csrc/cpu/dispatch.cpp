// Selects the instruction set at run time, once: the widest that the processor supports, or the value of
// CUDFAST_ISA=baseline|avx2|avx512. Before it is used, it must reproduce the results of the baseline on a fixed block.
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>

#include "sweeps.h"

#if defined(CUDFAST_X86)
#include <cpuid.h>
#endif

namespace cudfast {
namespace {

struct Choice {
  const Sweeps* sweeps;
  std::string warning;
  double check_seconds = 0;
};

const Sweeps* named(const char* isa) {
  int count = 0;
  const char* const* names = runnable(count);
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(names[i], isa) != 0) continue;
#if defined(CUDFAST_X86)
    if (std::strcmp(isa, "avx2") == 0) return &sweeps_avx2();
    if (std::strcmp(isa, "avx512") == 0) return &sweeps_avx512();
#endif
    return &sweeps_baseline();
  }
  return nullptr;
}

#if defined(CUDFAST_X86)
// Conversions of float16. __builtin_cpu_supports has no name for them in Clang, nor in GCC before 11.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

// One block with a partial vector at its end, through both sweeps, against the baseline.
bool agrees_with_baseline(const Sweeps& candidate) {
  constexpr int n = 1003;
  float s[n], t[n], g[n], g_expected[n];
  for (int i = 0; i < n; ++i) {
    s[i] = 8.0f * std::sin(0.37f * static_cast<float>(i));
    t[i] = 9.0f * std::cos(0.53f * static_cast<float>(i));
  }
  StudentBlock block{reinterpret_cast<const char*>(s),
                     reinterpret_cast<const char*>(t),
                     DType::f32,
                     DType::f32,
                     false,
                     n,
                     2,
                     kStudentOne | kTeacherOne,
                     0.5,
                     {},
                     nullptr,
                     DType::f32};
  const Sweeps& baseline = sweeps_baseline();
  StudentBlockState state, expected;
  candidate.student_state(block, state);
  baseline.student_state(block, expected);
  const auto close = [](double a, double b) { return std::fabs(a - b) <= 1e-5 * (1 + std::fabs(b)); };
  if (!(state.m_t == expected.m_t && state.m_s == expected.m_s && close(state.z_tau, expected.z_tau) &&
        close(state.s_tau, expected.s_tau) && close(state.a, expected.a) && close(state.s_one, expected.s_one))) {
    return false;
  }
  StudentBlockMap map{state.m_t, state.m_s, 1 / state.s_tau, 1 / state.z_tau, 1 / state.s_one,
                      0,         0,         false,           nullptr,         DType::f32};
  map.g = reinterpret_cast<char*>(g);
  candidate.student_gradient(block, map);
  map.g = reinterpret_cast<char*>(g_expected);
  baseline.student_gradient(block, map);
  for (int i = 0; i < n; ++i) {
    if (!close(g[i], g_expected[i])) return false;
  }
  return true;
}

Choice choose() {
  int count = 0;
  const char* const* names = runnable(count);
  const char* asked = std::getenv("CUDFAST_ISA");
  Choice choice{named(names[count - 1]), ""};
  if (asked && *asked) {
    if (const Sweeps* found = named(asked)) {
      choice.sweeps = found;
    } else {
      choice.warning = std::string("CUDFAST_ISA=") + asked + " cannot run here; expected one of:";
      for (int i = 0; i < count; ++i) choice.warning += std::string(" ") + names[i];
    }
  }
  const auto begin = std::chrono::steady_clock::now();
  const bool agrees = agrees_with_baseline(*choice.sweeps);
  choice.check_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  if (!agrees) {
    choice.warning =
        std::string(choice.sweeps->isa) + " disagrees with the baseline on this processor; baseline is used";
    choice.sweeps = &sweeps_baseline();
  }
  return choice;
}

Choice& current() {
  static Choice choice = choose();
  return choice;
}

}  // namespace

const char* const* runnable(int& count) {
  static const char* names[3] = {"baseline"};
  static const int found = [] {
    int n = 1;
#if defined(CUDFAST_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) names[n++] = "avx2";
    if (n == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      names[n++] = "avx512";
    }
#endif
    return n;
  }();
  count = found;
  return names;
}

const Sweeps& sweeps() { return *current().sweeps; }

bool use(const char* isa) {
  const Sweeps* found = named(isa);
  if (found) current().sweeps = found;
  return found != nullptr;
}

const char* isa_warning() { return current().warning.c_str(); }

double isa_check_seconds() { return current().check_seconds; }

}  // namespace cudfast
