// The two sweeps over one block of columns. Compiled once per instruction set, which CUDFAST_ISA names; everything but
// the table at the end is in an anonymous namespace. The sweeps do not depend on the losses: fold() and element() are
// those of row/.
#include "maps.h"

namespace cudfast {
namespace {

// Number of vectors that are summed before their sum is added to the block's. Short chains keep the error of f32 sums
// near one rounding; see docs/method.md, "Accuracy". There is one set of sums, because two sets and the exponentials do
// not fit into AVX2's registers.
constexpr int kChunk = 16;

template <class F>
StudentSums<F> zero_student() {
  return {F(0), F(0), F(0), F(0), F(0), F(0), F(0), F(0)};
}
template <class F>
TeacherSums<F> zero_teacher() {
  return {F(0), F(0)};
}

// Prefetches the next block while this one is summed: the pass for the maximum is limited by memory and the sums by
// arithmetic, and they would not overlap otherwise. Past the end of a row this is the next row; a prefetch never
// faults.
struct Ahead {
  const char* at;
  int64_t size;  // bytes per element

  Ahead(const char* block, DType dtype) : at(block + kBlock * size_of(dtype)), size(size_of(dtype)) {}
  __attribute__((always_inline)) void prefetch(int i) const { __builtin_prefetch(at + i * size); }
};

// Sums over a block: body(sums, i) folds the vector at column i, tail(sums) the last, partial one; ahead(i) is called
// for every cache line.
template <class T, class Sums, class Body, class Tail, class Prefetch>
inline __attribute__((always_inline)) Sums accumulate(int whole, int rest, Sums zero, Body body, Tail tail,
                                                      Prefetch ahead) {
  constexpr int width = Lanes<T>::count;
  Sums sums = zero;
  for (int start = 0; start < whole; start += kChunk * width) {
    const int end = start + kChunk * width < whole ? start + kChunk * width : whole;
    Sums chunk = zero;
    int i = start;
    for (; i + 2 * width <= end; i += 2 * width) {
      ahead(i);
      if constexpr (sizeof(Lanes<T>) >= 64) ahead(i + width);
      body(chunk, i);
      body(chunk, i + width);
    }
    if (i < end) body(chunk, i);
    add(sums, chunk);
  }
  if (rest > 0) tail(sums);
  return sums;
}

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

constexpr int kOnes = kStudentOne | kTeacherOne, kEntropies = kStudentEntropy | kTeacherEntropy;
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

// ---- Rows with the sums of row/extended.h ----

template <class F>
struct AllSums {
  StudentSums<F> student;
  ExtendedSums<F> more;
};
template <class F>
inline __attribute__((always_inline)) void add(AllSums<F>& to, const AllSums<F>& from) {
  add(to.student, from.student);
  add(to.more, from.more);
}
template <class F>
ExtendedSums<F> zero_extended() {
  return {F(0), F(0), F(0), F(0), F(0), F(0)};
}

template <class T, int P, int Needs, int Holes, bool Keep>
__attribute__((noinline)) AllSums<Lanes<T>> extended_sums(const StudentBlock& b, const ExtendedBlock& x,
                                                          const Columns<T>& s, const Columns<T>& t, T m_s, T m_t) {
  using F = Lanes<T>;
  const Ahead next_s(b.s, b.s_dtype), next_t(b.t, b.t_dtype);
  const F ms(m_s), mt(m_t), inv_t(x.inv_t), inv_s(b.inv_tau);
  T* const kept_t = reinterpret_cast<T*>(b.kept.teacher);
  T* const kept_s = reinterpret_cast<T*>(b.kept.student);
  const T *const at_s = s.data, *const at_t = t.data;
  const Weights<T> weights(x.weights);
  const char* const g = Keep ? b.g : nullptr;
  const int64_t g_size = size_of(b.g_dtype);
  return accumulate<T>(
      s.whole, s.rest, AllSums<F>{zero_student<F>(), zero_extended<F>()},
      [=](auto& sums, int i) __attribute__((always_inline)) {
        const auto e = fold<P, Needs, Holes>(sums.student, sums.more, F::load(at_t + i) - mt, F::load(at_s + i) - ms,
                                             inv_t, inv_s, weights.at(i));
        if constexpr (Keep) {
          e.teacher.store(kept_t + i);
          e.student.store(kept_s + i);
        }
      },
      [&](auto& sums) {
        const auto e = fold<P, Needs, Holes == kFull ? kPadded : Holes>(
            sums.student, sums.more, only(t.last() - mt, s.rest), only(s.last() - ms, s.rest), inv_t, inv_s,
            weights.some(s.whole, s.rest));
        if constexpr (Keep) {
          store_some(e.teacher, s.rest, kept_t + s.whole);
          store_some(e.student, s.rest, kept_s + s.whole);
        }
      },
      [=](int i) __attribute__((always_inline)) {
        next_s.prefetch(i);
        next_t.prefetch(i);
        if (g) __builtin_prefetch(g + i * g_size, 1);
      });
}

constexpr int kEverySum = kOnes | kEntropies | kReverse | kUniform | kSquare;

// N is a mask that includes `needs`, from a list that has the usual ones exactly.
template <class F>
void with_extended_needs(int power, int needs, F f) {
  const int more = needs & ~kOnes;
  if (power > 0) {
    if (more == kReverse) return with_power<kOnes | kReverse>(power, f);
    if (more == kUniform) return with_power<kOnes | kUniform>(power, f);
    return with_power<kEverySum>(power, f);
  }
  if (needs == 0) return f(Constant<0>{}, Constant<0>{});
  if (needs == kStudentOne) return f(Constant<0>{}, Constant<kStudentOne>{});
  if (needs == kReverse) return f(Constant<0>{}, Constant<kReverse>{});
  if (needs == (kStudentOne | kReverse)) return f(Constant<0>{}, Constant<kStudentOne | kReverse>{});
  if (needs == (kStudentOne | kUniform)) return f(Constant<0>{}, Constant<kStudentOne | kUniform>{});
  f(Constant<0>{}, Constant<kEverySum>{});
}

template <class T>
void extended_state(const StudentBlock& b, const ExtendedBlock& x, ExtendedBlockState& out) {
  alignas(64) T s_buffer[kBlock], t_buffer[kBlock];
  const Looked<T> looked_s = looked<T>(b.s, b.s_dtype, b.n, s_buffer);
  const Looked<T> looked_t = looked<T>(b.t, b.t_dtype, b.n, t_buffer, b.view);
  const Columns<T>&s = looked_s.columns, &t = looked_t.columns;
  const Range<T> rs = looked_s.range;
  Range<T> rt = looked_t.range;
  const bool holes = rs.holes() || rt.holes() || rs.holes(b.inv_tau) || rt.holes(x.inv_t);
  if (rt.high == kApart<T>) rt.high = kNothing<T>;
  if (holes && !b.view.plain()) Columns<T>::mask(t_buffer, b.view, kNothing<T>);
  const T m_s = rs.centre(), m_t = rt.centre();
  with_extended_needs(b.power, b.needs, [&](auto p, auto needs) {
    constexpr int P = decltype(p)::value, Needs = decltype(needs)::value;
    constexpr bool can_keep = P > 0;
    AllSums<Lanes<T>> sums;
    if (can_keep && b.kept.teacher) {
      sums = holes ? extended_sums<T, P, Needs, kHoles, can_keep>(b, x, s, t, m_s, m_t)
                   : extended_sums<T, P, Needs, kFull, can_keep>(b, x, s, t, m_s, m_t);
    } else {
      sums = holes ? extended_sums<T, P, Needs, kHoles, false>(b, x, s, t, m_s, m_t)
                   : extended_sums<T, P, Needs, kFull, false>(b, x, s, t, m_s, m_t);
    }
    const StudentSums<Lanes<T>>& own = sums.student;
    const ExtendedSums<Lanes<T>>& more = sums.more;
    out = {{rt.high, rs.high, total(own.z_tau), total(own.s_tau), total(own.a), total(own.s_one), total(own.z_one),
            total(own.impossible) > 0 ? 1.0 : 0.0, total(own.e_one), total(own.e_s)},
           total(more.b),
           total(more.missing),
           total(more.uniform),
           total(more.share),
           total(more.possible),
           total(more.s_two)};
  });
}

template <class F>
struct OwnSums {
  TeacherSums<F> own;
  ExtendedSums<F> more;
};
template <class F>
inline __attribute__((always_inline)) void add(OwnSums<F>& to, const OwnSums<F>& from) {
  add(to.own, from.own);
  add(to.more, from.more);
}

template <class T, bool Holes>
__attribute__((noinline)) OwnSums<Lanes<T>> extended_teacher_sums(const TeacherBlock& b, const Weights<T>& weights,
                                                                  const Columns<T>& s, T m) {
  using F = Lanes<T>;
  const Ahead next(b.s, b.dtype);
  const F centre(m);
  const auto folded = [&](auto& sums, F x, F weight, auto holes) __attribute__((always_inline)) {
    fold<decltype(holes)::value != 0>(sums.own, x);
    fold_own<kUniform | kSquare>(sums.more, x, exp(x), weight);
  };
  return accumulate<T>(
      s.whole, s.rest, OwnSums<F>{zero_teacher<F>(), zero_extended<F>()},
      [&](auto& sums, int i) { folded(sums, s.at(i) - centre, weights.at(i), Constant<Holes>{}); },
      [&](auto& sums) { folded(sums, only(s.last() - centre, s.rest), weights.some(s.whole, s.rest), Constant<1>{}); },
      [&](int i) __attribute__((always_inline)) { next.prefetch(i); });
}

template <class T>
void extended_teacher_state(const TeacherBlock& b, const char* weights, ExtendedTeacherBlockState& out) {
  alignas(64) T buffer[kBlock];
  const Looked<T> seen = looked<T>(b.s, b.dtype, b.n, buffer);
  const Range<T> r = seen.range;
  const Weights<T> c(weights);
  const auto sums = r.holes() ? extended_teacher_sums<T, true>(b, c, seen.columns, r.centre())
                              : extended_teacher_sums<T, false>(b, c, seen.columns, r.centre());
  out = {{r.high, total(sums.own.s_one), total(sums.own.e_s)},
         total(sums.more.s_two),
         total(sums.more.uniform),
         total(sums.more.share),
         total(sums.more.possible)};
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
void extended_state_any(const StudentBlock& b, const ExtendedBlock& x, ExtendedBlockState& out) {
  b.wide ? extended_state<double>(b, x, out) : extended_state<float>(b, x, out);
}
void extended_gradient_any(const StudentBlock& b, const ExtendedBlock& x, const ExtendedBlockMap& m) {
  b.wide ? extended_gradient<double>(b, x, m) : extended_gradient<float>(b, x, m);
}
void extended_teacher_state_any(const TeacherBlock& b, const char* weights, ExtendedTeacherBlockState& out) {
  b.wide ? extended_teacher_state<double>(b, weights, out) : extended_teacher_state<float>(b, weights, out);
}
void extended_teacher_gradient_any(const TeacherBlock& b, const ExtendedTeacherBlockMap& m) {
  b.wide ? extended_teacher_gradient<double>(b, m) : extended_teacher_gradient<float>(b, m);
}
void tempered_any(const TeacherBlock& b, const View& view, TemperedBlockSums& out) {
  b.wide ? tempered<double>(b, view, out) : tempered<float>(b, view, out);
}
int find_any(const char* from, DType dtype, bool wide, int n, double value) {
  return wide ? find<double>(from, dtype, n, value) : find<float>(from, dtype, n, value);
}

}  // namespace

#define CUDFAST_JOIN_(a, b) a##b
#define CUDFAST_JOIN(a, b) CUDFAST_JOIN_(a, b)
#define CUDFAST_STRING_(a) #a
#define CUDFAST_STRING(a) CUDFAST_STRING_(a)

const Sweeps& CUDFAST_JOIN(sweeps_, CUDFAST_ISA)() {
  static constexpr Sweeps table = {CUDFAST_STRING(CUDFAST_ISA),
                                   kStreams,
                                   student_state_any,
                                   student_gradient_any,
                                   teacher_state_any,
                                   teacher_gradient_any,
                                   extended_state_any,
                                   extended_gradient_any,
                                   extended_teacher_state_any,
                                   extended_teacher_gradient_any,
                                   tempered_any,
                                   find_any,
                                   exp_all<float>,
                                   exp_all<double>};
  return table;
}

}  // namespace cudfast
