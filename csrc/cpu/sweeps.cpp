// The two sweeps over one block of columns. Compiled once per instruction set, which CUDFAST_ISA names; everything but
// the table at the end is in an anonymous namespace. The sweeps do not depend on the losses: fold() and element() are
// those of row/.
#include "maps.h"
#include "sums.h"

namespace cudfast {
namespace {

template <class T, int P, int Needs, int Holes, bool Keep>
__attribute__((noinline)) StudentSums<Lanes<T>> student_sums(const StudentBlock& b, const Columns<T>& s,
                                                             const Columns<T>& t, T m_s, T m_t) {
  using F = Lanes<T>;
  const Ahead next_s(b.s, b.s_dtype), next_t(b.t, b.t_dtype);
  const F ms(m_s), mt(m_t), inv(b.inv_tau);
  T* const kept_t = reinterpret_cast<T*>(b.kept.teacher);
  T* const kept_s = reinterpret_cast<T*>(b.kept.student);
  const T *const at_s = s.data, *const at_t = t.data;  // captured by value, since stores may alias them
  const char* const g = Keep ? b.g : nullptr;
  const int64_t g_size = size_of(b.g_dtype);
  return accumulate<T>(
      s.whole, s.rest, zero_student<F>(),
      [=](auto& sums, int i) __attribute__((always_inline)) {
        const auto e = fold<P, Needs, Holes>(sums, F::load(at_t + i) - mt, F::load(at_s + i) - ms, inv);
        if constexpr (Keep) {
          e.teacher.store(kept_t + i);
          e.student.store(kept_s + i);
        }
      },
      [&](auto& sums) {
        const auto e = fold<P, Needs, Holes == kFull ? kPadded : Holes>(sums, only(t.last() - mt, s.rest),
                                                                        only(s.last() - ms, s.rest), inv);
        if constexpr (Keep) {
          store_some(e.teacher, s.rest, kept_t + s.whole);
          store_some(e.student, s.rest, kept_s + s.whole);
        }
      },
      [=](int i) __attribute__((always_inline)) {  // compilers may drop a call that only prefetches
        next_s.prefetch(i);
        next_t.prefetch(i);
        if (g) __builtin_prefetch(g + i * g_size, 1);
      });
}

template <class F>
__attribute__((noinline)) void with_entropies(int power, int needs, F f) {
  if ((needs & kEntropies) == kEntropies) return with_power<kOnes | kEntropies>(power, f);
  if (needs & kStudentEntropy) return with_power<kOnes | kStudentEntropy>(power, f);
  with_power<kOnes | kTeacherEntropy>(power, f);
}
// N is a mask that includes `needs`.
template <class F>
inline __attribute__((always_inline)) void with_needs(int power, int needs, F f) {
  if (needs & kEntropies) return with_entropies(power, needs, f);
  if (power > 0 || (needs & kTeacherOne)) return with_power<kOnes>(power, f);
  needs == 0 ? f(Constant<0>{}, Constant<0>{}) : f(Constant<0>{}, Constant<kStudentOne>{});
}

template <class T>
void student_state(const StudentBlock& b, StudentBlockState& out) {
  alignas(64) T s_buffer[kBlock], t_buffer[kBlock];
  const Looked<T> looked_s = looked<T>(b.s, b.s_dtype, b.n, s_buffer);
  const Looked<T> looked_t = looked<T>(b.t, b.t_dtype, b.n, t_buffer, b.view);
  const Columns<T>&s = looked_s.columns, &t = looked_t.columns;
  const Range<T> rs = looked_s.range;
  Range<T> rt = looked_t.range;
  bool holes = rs.holes() || rt.holes();
  if (rt.high == kApart<T>) rt.high = kNothing<T>;
  if (holes && !b.view.plain()) Columns<T>::mask(t_buffer, b.view, kNothing<T>);  // a class apart is not impossible
  const T m_s = rs.centre(), m_t = rt.centre();
  with_needs(b.power, b.needs, [&](auto p, auto needs) {
    constexpr int P = decltype(p)::value, Needs = decltype(needs)::value;
    constexpr bool can_keep = P > 0;
    if constexpr (P == 0) holes |= rs.holes(b.inv_tau) || rt.holes(b.inv_tau);  // a temperature below 1
    StudentSums<Lanes<T>> sums;
    if (can_keep && b.kept.teacher) {
      sums = holes ? student_sums<T, P, Needs, kHoles, can_keep>(b, s, t, m_s, m_t)
                   : student_sums<T, P, Needs, kFull, can_keep>(b, s, t, m_s, m_t);
    } else {
      sums = holes ? student_sums<T, P, Needs, kHoles, false>(b, s, t, m_s, m_t)
                   : student_sums<T, P, Needs, kFull, false>(b, s, t, m_s, m_t);
    }
    out = {rt.high,
           rs.high,
           total(sums.z_tau),
           total(sums.s_tau),
           total(sums.a),
           total(sums.s_one),
           total(sums.z_one),
           total(sums.impossible) > 0 ? 1.0 : 0.0,
           (Needs & kTeacherEntropy) != 0 ? total(sums.e_one) : 0.0,
           (Needs & kStudentEntropy) != 0 ? total(sums.e_s) : 0.0};
  });
}

template <class T, bool Holes>
__attribute__((noinline)) TeacherSums<Lanes<T>> teacher_sums(const TeacherBlock& b, const Columns<T>& s, T m) {
  using F = Lanes<T>;
  const Ahead next(b.s, b.dtype);
  const F centre(m);
  return accumulate<T>(
      s.whole, s.rest, zero_teacher<F>(), [&](auto& sums, int i) { fold<Holes>(sums, s.at(i) - centre); },
      [&](auto& sums) { fold<true>(sums, only(s.last() - centre, s.rest)); },
      [&](int i) __attribute__((always_inline)) { next.prefetch(i); });
}

template <class T>
void teacher_state(const TeacherBlock& b, TeacherBlockState& out) {
  alignas(64) T buffer[kBlock];
  const Looked<T> seen = looked<T>(b.s, b.dtype, b.n, buffer);
  const Columns<T>& s = seen.columns;
  const Range<T> r = seen.range;
  const auto sums = r.holes() ? teacher_sums<T, true>(b, s, r.centre()) : teacher_sums<T, false>(b, s, r.centre());
  out = {r.high, total(sums.s_one), total(sums.e_s)};
}

template <class F>
void add(TemperedSums<F>& to, const TemperedSums<F>& from) {
  to.z = to.z + from.z;
  to.e = to.e + from.e;
  to.v = to.v + from.v;
}

template <class T, bool Flat>
TemperedSums<Lanes<T>> tempered_sums(const Columns<T>& t, T m, T inverse) {
  using F = Lanes<T>;
  const F centre(m), beta(inverse);
  return accumulate<T>(
      t.whole, t.rest, TemperedSums<F>{F(0), F(0), F(0)},
      [&](auto& sums, int i) { fold<Flat>(sums, t.at(i) - centre, beta); },
      [&](auto& sums) { fold<Flat>(sums, only(t.last() - centre, t.rest), beta); }, [](int) {});
}

template <class T>
void tempered(const TeacherBlock& b, View view, TemperedBlockSums& out) {
  const T centre = static_cast<T>(view.centre), beta = static_cast<T>(view.beta);
  view.beta = 1;  // the columns are not changed
  alignas(64) T buffer[kBlock];
  const Columns<T> t(b.s, b.dtype, b.n, buffer, view);
  const auto sums = beta == 0 ? tempered_sums<T, true>(t, centre, beta) : tempered_sums<T, false>(t, centre, beta);
  out = {total(sums.z), total(sums.e), total(sums.v)};
}

template <class T>
int find(const char* from, DType dtype, int n, double value) {
  using F = Lanes<T>;
  alignas(64) T buffer[kBlock];
  const Columns<T> columns(from, dtype, n, buffer);
  const F wanted(value);
  for (int i = 0; i < columns.whole; i += F::count) {
    const int lane = first_equal(columns.at(i), wanted);
    if (lane >= 0) return i + lane;
  }
  const int lane = columns.rest > 0 ? first_equal(columns.last(), wanted) : -1;
  return lane >= 0 ? columns.whole + lane : 0;
}

template <class T>
void exp_all(const T* x, T* y, int64_t n) {
  using F = Lanes<T>;
  T part[F::count];
  for (int64_t i = 0; i < n; i += F::count) {
    const int valid = n - i < F::count ? static_cast<int>(n - i) : F::count;
    for (int lane = 0; lane < F::count; ++lane) part[lane] = lane < valid ? x[i + lane] : T(0);
    exp(F::load(part)).store(part);
    for (int lane = 0; lane < valid; ++lane) y[i + lane] = part[lane];
  }
}

// f64 or f32, one place for the choice.
void student_state_any(const StudentBlock& b, StudentBlockState& out) {
  b.wide ? student_state<double>(b, out) : student_state<float>(b, out);
}
void student_gradient_any(const StudentBlock& b, const StudentBlockMap& m) {
  b.wide ? student_gradient<double>(b, m) : student_gradient<float>(b, m);
}
void teacher_state_any(const TeacherBlock& b, TeacherBlockState& out) {
  b.wide ? teacher_state<double>(b, out) : teacher_state<float>(b, out);
}
void teacher_gradient_any(const TeacherBlock& b, const TeacherBlockMap& m) {
  b.wide ? teacher_gradient<double>(b, m) : teacher_gradient<float>(b, m);
}
void tempered_any(const TeacherBlock& b, const View& view, TemperedBlockSums& out) {
  b.wide ? tempered<double>(b, view, out) : tempered<float>(b, view, out);
}
int find_any(const char* from, DType dtype, bool wide, int n, double value) {
  return wide ? find<double>(from, dtype, n, value) : find<float>(from, dtype, n, value);
}

}  // namespace

const Sweeps& CUDFAST_JOIN(sweeps_, CUDFAST_ISA)() {
  static constexpr Sweeps table = {CUDFAST_STRING(CUDFAST_ISA),
                                   kStreams,
                                   student_state_any,
                                   student_gradient_any,
                                   teacher_state_any,
                                   teacher_gradient_any,
                                   CUDFAST_JOIN(extended_sweeps_, CUDFAST_ISA),
                                   tempered_any,
                                   find_any,
                                   exp_all<float>,
                                   exp_all<double>};
  return table;
}

}  // namespace cudfast
