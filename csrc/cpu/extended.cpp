// Rows with the sums of row/extended.h; W-Clip at low temperatures among them. A file of its own, so that what the
// compiler inlines for other rows does not depend on them.
#include "extended.h"

#include "run.h"

namespace cudfast {
namespace {

// c_j from `column` on, or null.
inline const char* weights_at(const Rows& rows, int64_t column) {
  return rows.class_weight ? rows.class_weight + column * (rows.wide() ? 8 : 4) : nullptr;
}

template <template <class> class State>
ExtendedEnd<double> extended_end(const Rows& rows, int64_t row, const State<double>& state, const Terms& terms,
                                 Divisors divisors, double upstream) {
  const bool labelled = rows.labelled(row);
  const RowWeights<double> weights = row_weights(rows.ignored(row), labelled, rows.weight_at(row));
  ExtendedEnd<double> end;
  finish_row(state, labelled, rows.temperature_at(row), weights, terms, divisors, rows.coefficients_at(row), upstream,
             end);
  return end;
}

struct ExtendedLossOfRows : StudentLossOfRows {
  using State = ExtendedState<double>;
  using Row = ExtendedEnd<double>;

  bool recalibrates;

  explicit ExtendedLossOfRows(const StudentLossOfRows& base)
      : StudentLossOfRows(base), recalibrates(rows.recalibrates(terms)) {
    needs |= terms.sums;
    if (needs & kTeacherEntropy) needs |= kTeacherOne;
    if (needs & (kStudentEntropy | kSquare)) needs |= kStudentOne;
  }

  const ExtendedLossOfRows& prepared(int64_t, const State*) const { return *this; }
  int64_t again(int64_t, int, const std::vector<State>&) const { return kNone; }

  Inverse<double> inverse(int64_t row) const { return inverse_of(terms, rows.temperature_at(row)); }
  // One exponential gives the other if both temperatures are one power.
  bool keeps(int64_t row) const {
    return is_power(rows.temperature_at(row)) && rows.teacher_temperature_at(row, terms) == rows.temperature_at(row);
  }

  StudentBlock block(int64_t row, int64_t column, int n, Kept kept) const {
    StudentBlock b = StudentLossOfRows::block(row, column, n, kept);
    if (!keeps(row)) b.power = 0;
    return b;
  }
  ExtendedBlock more(int64_t row, int64_t column) const { return {inverse(row).teacher, weights_at(rows, column)}; }

  State fold(int64_t row, int64_t column, int n, Kept kept) const {
    return fold(block(row, column, n, kept), more(row, column), column);
  }
  State fold(const StudentBlock& b, const ExtendedBlock& x, int64_t column) const {
    ExtendedBlockState part;
    sweeps().extended().student_state(b, x, part);
    State state;
    static_cast<StudentState<double>&>(state) = state_of(part, column);
    state.e_t = part.e_one;
    state.s_two = part.s_two;
    state.b = part.b;
    state.missing = part.missing;
    state.uniform = part.uniform;
    state.share = part.share;
    state.possible = part.possible;
    return state;
  }

  State merged(int64_t row, const State& left, const State& right) const { return merge(left, right, inverse(row)); }

  void complete(int64_t row, State& state) const {
    StudentLossOfRows::complete(row, state);
    if (!recalibrates) return;
    const Clip<double> clip = clip_of(state, rows.labelled(row), terms);
    if (leaves(state, clip, inverse(row))) recalibrate(state, clip, rest_of(row, state), inverse(row), wide);
  }

  // The row's sums without the teacher's logits of its top-1 and of the label.
  Rest<double> rest_of(int64_t row, const State& state) const {
    const int64_t apart[2] = {state.k, rows.labels[row]};
    State sums;
    for (int64_t column = 0; column < rows.classes; column += kBlock) {
      const int n = static_cast<int>(std::min<int64_t>(kBlock, rows.classes - column));
      StudentBlock b = block(row, column, n, {});
      b.power = 0;
      b.needs = 0;
      b.view.column = column;
      for (int i = 0; i < 2; ++i) {
        const bool inside = column <= apart[i] && apart[i] < column + n;
        b.view.apart[i][0] = apart + i;
        b.view.apart[i][1] = apart + i + (inside ? 1 : 0);
      }
      sums = merged(row, sums, fold(b, more(row, column), column));
    }
    return {sums.m_t, sums.z_tau, sums.a};
  }

  void pack(const State& s, int64_t row, const Outputs& out) const {
    cudfast::pack(s, terms, recalibrates, out, wide, row);
    if (out.top1) out.top1[row] = s.k;
  }
  State unpack(int64_t row, const Outputs& from) const {
    State s = cudfast::unpack<State>(terms, recalibrates, from, wide, row);
    s.k = from.top1[row];
    return s;
  }

  Row finish(int64_t row, const State& state, double upstream) const {
    return extended_end(rows, row, state, terms, divisors, upstream);
  }

  void map(int64_t row, int64_t column, int n, const State& state, const State* part, const Row& r, const Matrix& g,
           Kept kept) const {
    StudentBlock b = block(row, column, n, kept);
    ExtendedBlockMap m{{r.target.centre, state.m_s, r.gradient.student_tau, r.gradient.teacher_tau, r.student_one,
                        r.student_log, r.log_z, r.target.impossible, g.at(row, column), g.dtype, g.stream},
                       r.gradient.reverse,
                       r.gradient.uniform};
    if (!part || m.holes) {
      b.kept = {};
    } else {
      const auto [inv_t, inv_s] = inverse(row);
      m.teacher_tau *= rescale(below(part->m_t, m.m_t) * inv_t);
      const double student = rescale(below(part->m_s, state.m_s) * inv_s);
      m.student_tau *= student;
      m.reverse *= student;
      const double down = rescale(below(part->m_s, state.m_s));
      m.student_one *= down;
      m.student_log *= down;
    }
    if (m.teacher_tau == 0 && m.reverse == 0) {  // as in StudentLossOfRows
      b.t = b.s;
      b.t_dtype = b.s_dtype;
      b.kept.teacher = b.kept.student;
      m.m_t = m.m_s;
    }
    sweeps().extended().student_gradient(b, more(row, column), m);
  }

  void fix(int64_t row, const State& state, const Row& r, const Matrix& g) const {
    put_fixes(fixes(state, r, label_of(rows, row), rows.class_weight, wide), g, row);
  }
};

struct ExtendedTeacherLossOfRows : TeacherLossOfRows {
  using State = ExtendedTeacherState<double>;
  using Row = ExtendedEnd<double>;

  explicit ExtendedTeacherLossOfRows(const TeacherLossOfRows& base) : TeacherLossOfRows(base) {}

  const ExtendedTeacherLossOfRows& prepared(int64_t, const State*) const { return *this; }
  int64_t again(int64_t, int, const std::vector<State>&) const { return kNone; }

  State fold(int64_t row, int64_t column, int n, Kept) const {
    ExtendedTeacherBlockState part;
    sweeps().extended().teacher_state(block(row, column, n), weights_at(rows, column), part);
    State state;
    state.m_s = part.m_s;
    state.s_one = part.s_one;
    state.e_s = part.e_s;
    state.s_two = part.s_two;
    state.uniform = part.uniform;
    state.share = part.share;
    state.possible = part.possible;
    return state;
  }

  State merged(int64_t, const State& left, const State& right) const { return merge(left, right); }

  void pack(const State& s, int64_t row, const Outputs& out) const { cudfast::pack(s, terms, false, out, wide, row); }
  State unpack(int64_t row, const Outputs& from) const { return cudfast::unpack<State>(terms, false, from, wide, row); }

  Row finish(int64_t row, const State& state, double upstream) const {
    return extended_end(rows, row, state, terms, divisors, upstream);
  }

  void map(int64_t row, int64_t column, int n, const State& state, const State*, const Row& r, const Matrix& g,
           Kept) const {
    const ExtendedTeacherBlockMap m{
        {state.m_s, 1 / state.s_one, r.log_z, r.gradient.one, r.gradient.log, g.at(row, column), g.dtype, g.stream},
        r.gradient.uniform,
        weights_at(rows, column)};
    sweeps().extended().teacher_gradient(block(row, column, n), m);
  }

  void fix(int64_t row, const State& state, const Row& r, const Matrix& g) const {
    put_fixes(fixes(state, r, label_of(rows, row), rows.class_weight, wide), g, row);
  }
};

}  // namespace

void extended_row_state(const Rows& rows, const Terms& terms, bool statistics, Divisors divisors, const Outputs& out) {
  if (!rows.target.data) return run(ExtendedTeacherLossOfRows({rows, terms, divisors, rows.wide()}), out);
  run(ExtendedLossOfRows({rows, terms, divisors, rows.wide(), needs_of(terms, statistics), out.gradient}), out);
}

void extended_row_gradient(const Rows& rows, const Terms& terms, Divisors divisors, Upstream upstream,
                           const Outputs& from) {
  if (!rows.target.data) {
    return run_gradient(ExtendedTeacherLossOfRows({rows, terms, divisors, rows.wide()}), upstream, from);
  }
  run_gradient(ExtendedLossOfRows({rows, terms, divisors, rows.wide(), needs_of(terms, false), Matrix{}}), upstream,
               from);
}

}  // namespace cudfast
