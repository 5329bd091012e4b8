// The sweeps over rows with the sums of row/extended.h. Compiled once per instruction set, as sweeps.cpp, which stays
// what it was without them.
#include "maps.h"
#include "sums.h"

namespace cudfast {
namespace {

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

template <class T, int P, int Needs, bool One, bool Holes, bool Kept>
__attribute__((noinline)) void extended_map(const StudentBlock& b, const ExtendedBlock& x, const ExtendedBlockMap& m) {
  using F = Lanes<T>;
  alignas(64) T s_buffer[kBlock], t_buffer[kBlock];
  const Columns<T> s(b.s, b.s_dtype, b.n, s_buffer), t(b.t, b.t_dtype, b.n, t_buffer, b.view);
  ExtendedStudentGradient<F> c;
  lanes_of(m, static_cast<StudentLogGradient<F>&>(c));
  c.reverse = F(m.reverse);
  c.uniform = F(m.uniform);
  const F ms(m.m_s), mt(m.m_t), inv_t(x.inv_t), inv_s(b.inv_tau);
  const T *const at_s = s.data, *const at_t = t.data;
  const T* const kept_t = reinterpret_cast<const T*>(b.kept.teacher);
  const T* const kept_s = reinterpret_cast<const T*>(b.kept.student);
  const Weights<T> weights(x.weights);
  const auto mapped = [=](F of_t, F of_s, auto kept, F weight) __attribute__((always_inline)) {
    const F dt = of_t - mt, ds = of_s - ms;
    Exponentials<F> e;
    if constexpr (Kept) {
      e = kept();
    } else {
      e = {exp(dt * inv_t), exp(ds * inv_s)};
    }
    F one = F(0);
    if constexpr (P > 0) {
      one = power<P>(e.student);
    } else if constexpr (One) {
      one = exp(ds);
    }
    return element<Needs, One, Holes>(c, e, one, dt, ds, inv_t, inv_s, weight);
  };
  map<T>(
      b.n, m,
      [=](int i) __attribute__((always_inline)) {
        const auto kept = [=] { return Exponentials<F>{F::load(kept_t + i), F::load(kept_s + i)}; };
        return mapped(F::load(at_t + i), F::load(at_s + i), kept, weights.at(i));
      },
      [&] {
        const auto kept = [&] {
          return Exponentials<F>{load_some(kept_t + s.whole, s.rest, T(0)), load_some(kept_s + s.whole, s.rest, T(0))};
        };
        return mapped(t.last(), s.last(), kept, weights.some(s.whole, s.rest));
      });
}

template <class T>
void extended_gradient(const StudentBlock& b, const ExtendedBlock& x, const ExtendedBlockMap& m) {
  const auto with_sums = [&](auto p, auto one) {
    constexpr int P = decltype(p)::value;
    constexpr bool One = decltype(one)::value != 0;
    const auto of = [&](auto needs) {
      constexpr int Needs = decltype(needs)::value;
      if constexpr (P > 0) {
        if (b.kept.teacher) return extended_map<T, P, Needs, One, false, true>(b, x, m);
      }
      m.holes ? extended_map<T, P, Needs, One, true, false>(b, x, m)
              : extended_map<T, P, Needs, One, false, false>(b, x, m);
    };
    if (m.reverse != 0 && m.uniform != 0) return of(Constant<kReverse | kUniform>{});
    m.reverse != 0 ? of(Constant<kReverse>{}) : of(Constant<kUniform>{});
  };
  if (b.power > 0) return with_power<1>(b.power, [&](auto p, auto) { with_sums(p, Constant<1>{}); });
  m.student_one == 0 && m.student_log == 0 ? with_sums(Constant<0>{}, Constant<0>{})
                                           : with_sums(Constant<0>{}, Constant<1>{});
}

template <class T>
void extended_teacher_gradient(const TeacherBlock& b, const ExtendedTeacherBlockMap& m) {
  using F = Lanes<T>;
  alignas(64) T buffer[kBlock];
  const Columns<T> s(b.s, b.dtype, b.n, buffer);
  const ExtendedTeacherGradient<F> c{{F(m.one), F(m.log)}, F(m.uniform)};
  const F centre(m.m_s), inv_z(m.inv_z), log_z(m.log_z);
  const T* const at = s.data;
  const Weights<T> weights(m.weights);
  map<T>(
      b.n, m,
      [=](int i)
          __attribute__((always_inline)) { return element(c, F::load(at + i) - centre, inv_z, log_z, weights.at(i)); },
      [&] { return element(c, s.last() - centre, inv_z, log_z, weights.some(s.whole, s.rest)); });
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
}  // namespace

const ExtendedSweeps& CUDFAST_JOIN(extended_sweeps_, CUDFAST_ISA)() {
  static constexpr ExtendedSweeps table = {extended_state_any, extended_gradient_any, extended_teacher_state_any,
                                           extended_teacher_gradient_any};
  return table;
}

}  // namespace cudfast
