// The student loss with a target that meets bounds on its mass and entropy. The classes of a row fall into three sets:
// near, wrong and the rest. The rest is swept with the other two masked out, so that its mass is never a difference;
// the two are short lists, gathered. The target then is one factor per set, and all else is the plain loss.
#pragma once

#include <atomic>
#include <vector>

#include "losses.h"
#include "threads.h"

namespace cudfast {
namespace {

constexpr int kSweeps = 12;                       // over the teacher's row, while its temperature is looked for
constexpr double kNats = 1e-5;                    // how far the entropy may stay from its bound
constexpr double kLogBetas = 13.815510557964274;  // log 1e6: beta = 1 / T lies in [1e-6, 1] or in [1, 1e6]

struct ProjectedState : StudentState<double> {
  double beta = 1, centre = 0;           // the teacher's logits are seen as t' = beta (t - centre)
  double near = 0, wrong = 0, rest = 0;  // log of the target at each set's maximum, relative to the largest of them
  double confidence = 0, prob = 0;       // the teacher's probability of its top-1 and of the label
  double target = 0, moved = 0;          // the label's after calibration; mass that changed sets
  double relaxed = 0;                    // a bound was out of reach
};

struct ProjectedLossOfRows {
  using State = ProjectedState;
  using Row = StudentLossOfRows::Row;
  static constexpr int columns = kStudentColumns + kProjectedColumns;

  StudentLossOfRows base;
  const Rows& rows;
  bool wide;
  bool statistics;
  std::atomic<int64_t>* unmet;  // the first row whose bounds are out of reach, or N

  // ---- One row, see prepared() ----
  struct Set {
    const int64_t* begin = nullptr;
    const int64_t* end = nullptr;
    // Memory for the logits, in the computing type: the teacher's, t' - m once seen; and the student's.
    std::vector<double> t, s;
    double m = 0;  // the largest t'

    int64_t size() const { return static_cast<int64_t>(t.size()); }
  };
  Set sets[2];                  // near, wrong: those that are summed apart
  const int64_t* near[2] = {};  // N(y), whether or not it is
  bool wrong_is_k = false;      // the wrong set is the top-1 alone
  int64_t k = 0;                // the teacher's top-1, when somebody asks
  View view;
  double log_total = 0;  // log sum exp t at T = 1, when the temperature was looked for
  bool tempered = false, out_of_reach = false;

  ProjectedLossOfRows(const StudentLossOfRows& of, std::atomic<int64_t>* first_unmet)
      : base(of), rows(of.rows), wide(of.wide), statistics(of.statistics), unmet(first_unmet) {
    base.statistics = true;  // the masses are sums at temperature 1
  }

  const int64_t* begin(int i) const { return i == 1 && wrong_is_k ? &k : sets[i].begin; }
  const int64_t* end(int i) const { return i == 1 && wrong_is_k ? &k + 1 : sets[i].end; }
  double bound(int64_t row, int which) const { return rows.constraints.bounds[row * 4 + which]; }
  double low(int64_t row) const { return begin(0) != end(0) ? bound(row, 0) : 0; }
  double high(int64_t row) const { return begin(1) != end(1) ? bound(row, 1) : 1; }

  View part_of_view(int64_t column, int n) const {
    View part = view;
    part.column = column;
    for (int i = 0; i < 2; ++i) {
      part.apart[i][0] = std::lower_bound(begin(i), end(i), column);
      const int64_t* stop = part.apart[i][0];
      while (stop != end(i) && *stop < column + n) ++stop;
      part.apart[i][1] = stop;
    }
    return part;
  }

  TeacherBlock teacher(int64_t row, int64_t column, int n) const {
    return {rows.target.at(row, column), rows.target.dtype, wide, n};
  }

  bool wants_top1(int64_t row) const {
    return rows.labelled(row) && rows.constraints.top1 && !std::isnan(bound(row, 1));
  }
  bool bounds_entropy(int64_t row) const {
    return rows.labelled(row) && !(std::isnan(bound(row, 2)) && std::isnan(bound(row, 3)));
  }

  // The maximum of each block of the teacher's row, through the view.
  std::vector<double> highest(int64_t row, int threads) const {
    std::vector<double> found(static_cast<size_t>(blocks_of(rows.classes)));
    each_block(threads, rows.classes, [&](int64_t i, int64_t column, int n) {
      found[static_cast<size_t>(i)] = sweeps().highest(teacher(row, column, n), part_of_view(column, n));
    });
    return found;
  }

  // The same loss for one row: its sets, the temperature of its target. `packed`: what an earlier call found.
  ProjectedLossOfRows prepared(int64_t row, int threads, const State* packed) const {
    ProjectedLossOfRows own = *this;
    own.find_sets(row);
    if (packed) {
      own.view.beta = packed->beta;
      own.view.centre = packed->centre;
      own.set_top1(row, packed->k);
    } else if (bounds_entropy(row)) {
      std::vector<double> high = own.highest(row, threads);
      const int64_t again = own.find_top1(row, high);
      if (again >= 0) high = own.highest(row, threads);
      own.find_temperature(row, threads, *std::max_element(high.begin(), high.end()));
    }
    for (Set& set : own.sets) own.see(set);
    return own;
  }

  void find_sets(int64_t row) {
    if (!rows.labelled(row)) return;
    const Constraints& c = rows.constraints;
    const int64_t* y = rows.labels + row;
    near[0] = c.near.offsets ? c.near.indices + c.near.offsets[*y] : y;
    near[1] = c.near.offsets ? c.near.indices + c.near.offsets[*y + 1] : y + 1;
    if (!std::isnan(bound(row, 0))) set_to(row, 0, near[0], near[1]);
    if (!std::isnan(bound(row, 1)) && c.wrong.offsets) {
      set_to(row, 1, c.wrong.indices + c.wrong.offsets[*y], c.wrong.indices + c.wrong.offsets[*y + 1]);
    }
  }

  void set_to(int64_t row, int i, const int64_t* from, const int64_t* to) {
    Set& set = sets[i];
    set.begin = from;
    set.end = to;
    set.t.resize(static_cast<size_t>(to - from));
    set.s.resize(set.t.size());
    const Element teacher_row(rows.target, row), student_row(rows.logits, row);
    for (int64_t j = 0; j < set.size(); ++j) {
      put(set.t.data(), wide, j, teacher_row.load(from[j]));
      put(set.s.data(), wide, j, student_row.load(from[j]));
    }
  }

  // The largest of the teacher's logits, or 0 where there is none.
  double centre_of(const Set& set) const {
    double top = kNothing<double>;
    for (int64_t j = 0; j < set.size(); ++j) top = max(top, get(set.t.data(), wide, j));
    return top == kNothing<double> ? 0 : top;
  }

  // t becomes t' relative to the set's own maximum, so that a large beta costs no digits.
  void see(Set& set) const {
    const double top = centre_of(set);
    for (int64_t j = 0; j < set.size(); ++j) {
      put(set.t.data(), wide, j, view.beta * (get(set.t.data(), wide, j) - top));
    }
    set.m = seen(top);
  }

  // f(first member, members) for the blocks of a set.
  template <class F>
  static void each_part(const Set& set, F f) {
    for (int64_t j = 0; j < set.size(); j += kBlock) f(j, static_cast<int>(std::min<int64_t>(kBlock, set.size() - j)));
  }

  TeacherBlock teacher(const Set& set, int64_t j, int n) const { return {at(set.t, j), type(), wide, n}; }
  DType type() const { return wide ? DType::f64 : DType::f32; }
  const char* at(const std::vector<double>& memory, int64_t j) const {
    return reinterpret_cast<const char*>(memory.data()) + j * size_of(type());
  }

  // A set as if it were a row of its own.
  StudentBlock block(int64_t row, const Set& set, int64_t j, int n) const {
    StudentBlock b = base.block(row, 0, n, {});
    b.s = at(set.s, j);
    b.t = at(set.t, j);
    b.s_dtype = b.t_dtype = type();
    return b;
  }

  // The top-1 is the wrong class where that is asked for and it is not near; then its block must be looked at again.
  int64_t set_top1(int64_t row, int64_t top1) {
    k = top1;
    wrong_is_k = wants_top1(row) && !std::binary_search(near[0], near[1], k);
    if (!wrong_is_k) return -1;
    set_to(row, 1, &k, &k + 1);
    return k / kBlock;
  }

  // From the maxima of the rest's blocks, and the sets. Ties go to the lowest index.
  int64_t find_top1(int64_t row, const std::vector<double>& high) {
    const int64_t best = std::max_element(high.begin(), high.end()) - high.begin();
    double top = high[static_cast<size_t>(best)];
    const Element teacher_row(rows.target, row);
    const int n = static_cast<int>(std::min<int64_t>(kBlock, rows.classes - best * kBlock));
    int64_t found = best * kBlock + sweeps().find(rows.target.at(row, best * kBlock), rows.target.dtype, wide, n, top);
    for (int i = 0; i < 2; ++i) {
      for (int64_t j = 0; j < sets[i].size(); ++j) {
        const int64_t column = begin(i)[j];
        const double t = teacher_row.load(column);
        if (t > top || (t == top && column < found)) {
          top = t;
          found = column;
        }
      }
    }
    return set_top1(row, found);
  }

  // After the blocks were folded: the block that must be folded again because the top-1 is summed apart, or -1.
  int64_t again(int64_t row, const std::vector<State>& parts) {
    if (view.beta != 1 || bounds_entropy(row) || !(wants_top1(row) || statistics)) return -1;
    std::vector<double> high;
    for (const State& part : parts) high.push_back(part.m_t);
    const int64_t block = find_top1(row, high);
    if (block >= 0) see(sets[1]);
    return block;
  }

  double seen(double t) const { return view.beta == 1 ? t : view.beta * (t - view.centre); }

  // ---- The temperature at which the entropy meets its bound ----

  Entropy<double> entropy_at(int64_t row, int threads, double log_beta, double* total) {
    const double beta = std::exp(log_beta);
    TemperedState<double> states[3];
    for (int i = 0; i < 2; ++i) {
      View around;
      around.centre = states[i].m = centre_of(sets[i]);
      around.beta = beta;
      each_part(sets[i], [&](int64_t j, int n) {
        TemperedBlockSums part;
        sweeps().tempered(teacher(sets[i], j, n), around, part);
        states[i] = {states[i].m, states[i].z + part.z, states[i].e + part.e, states[i].v + part.v};
      });
    }
    std::vector<TemperedBlockSums> parts(static_cast<size_t>(blocks_of(rows.classes)));
    each_block(threads, rows.classes, [&](int64_t i, int64_t column, int n) {
      View part = part_of_view(column, n);
      part.beta = beta;
      sweeps().tempered(teacher(row, column, n), part, parts[static_cast<size_t>(i)]);
    });
    states[2].m = view.centre;
    for (const TemperedBlockSums& part : parts) {
      states[2].z += part.z;
      states[2].e += part.e;
      states[2].v += part.v;
    }
    const double near = log_mass(states[0], beta), wrong = log_mass(states[1], beta), rest = log_mass(states[2], beta);
    if (total) *total = log_add(log_add(near, wrong), rest);
    return entropy(states, masses(near, wrong, rest, low(row), high(row)), beta);
  }

  void find_temperature(int64_t row, int threads, double top) {
    view.centre = top == kNothing<double> ? 0 : top;
    tempered = true;
    const double tolerance = wide ? 1e-12 : 5e-6;
    const End<double> start{0, entropy_at(row, threads, 0, &log_total)};
    const bool too_low = start.found.value < bound(row, 2) - tolerance;
    const bool too_high = start.found.value > bound(row, 3) + tolerance;
    if (!too_low && !too_high) return leave_temperature(0);
    const double wanted = too_low ? bound(row, 2) : bound(row, 3);
    const double end = too_low ? -kLogBetas : kLogBetas;
    const End<double> limit{end, entropy_at(row, threads, end, nullptr)};
    if (too_low ? limit.found.value <= wanted : limit.found.value >= wanted) {
      out_of_reach = std::fabs(limit.found.value - wanted) > kNats;
      return leave_temperature(end);
    }
    End<double> low = too_low ? limit : start, high = too_low ? start : limit;
    double log_beta = temper(low, high, wanted);
    // From the uniform end, H = limit - beta^2 var / 2.
    const double guess = end + 0.5 * std::log(2 * (limit.found.value - wanted) / -limit.found.slope);
    const bool nearer = limit.found.value - wanted < wanted - start.found.value;
    if (too_low && nearer && guess > low.at && guess < high.at) log_beta = guess;
    for (int sweep = 2;;) {
      const End<double> here{log_beta, entropy_at(row, threads, log_beta, nullptr)};
      if (++sweep >= kSweeps || !(std::fabs(here.found.value - wanted) > tolerance)) break;
      (here.found.value > wanted ? low : high) = here;
      log_beta = temper(low, high, wanted);
    }
    leave_temperature(log_beta);
  }

  void leave_temperature(double log_beta) {
    view.beta = std::exp(log_beta);
    if (view.beta == 1) view.centre = 0;
  }

  // ---- What the driver calls ----

  StudentBlock block(int64_t row, int64_t column, int n, Kept kept) const {
    StudentBlock b = base.block(row, column, n, kept);
    b.view = part_of_view(column, n);
    return b;
  }

  State fold(int64_t row, int64_t column, int n, Kept kept) const {
    State state;
    static_cast<StudentState<double>&>(state) = base.fold(block(row, column, n, kept), column);
    return state;
  }

  State merged(int64_t row, const State& left, const State& right) const {
    State state;
    static_cast<StudentState<double>&>(state) = base.merged(row, left, right);
    return state;
  }

  // From the rest's state to that of the target: sums over all three sets, each with its factor.
  void complete(int64_t row, State& state) const {
    const double tau = rows.value_at(row), inv_tau = 1 / tau;
    if (rows.labelled(row)) {
      state.t_y = load(rows.target, row, rows.labels[row]);
      state.s_y = load(rows.logits, row, rows.labels[row]);
    }
    state.k = k;
    state.beta = view.beta;
    state.centre = view.centre;
    StudentState<double> parts[3];
    double at[3], mass[3];  // log of the largest, and of all, relative to t'
    for (int i = 0; i < 2; ++i) {
      each_part(sets[i], [&](int64_t j, int n) {
        parts[i] = base.merged(row, parts[i], base.fold(block(row, sets[i], j, n), 0));
      });
      parts[i] = move(parts[i], parts[i].m_t, state.m_s, inv_tau);  // around the row's own student maximum
    }
    parts[2] = state;
    for (int i = 0; i < 3; ++i) at[i] = parts[i].m_t + (i < 2 ? sets[i].m : 0);
    for (int i = 0; i < 3; ++i) mass[i] = parts[i].z_one == 0 ? kNothing<double> : at[i] + std::log(parts[i].z_one);
    const double total = log_add(log_add(mass[0], mass[1]), mass[2]);
    if (!(total < std::numeric_limits<double>::infinity())) {  // NaN or +inf among the logits
      state.z_tau = state.a = std::numeric_limits<double>::quiet_NaN();
      return;
    }
    const Masses<double> target = masses(mass[0], mass[1], mass[2], low(row), high(row));
    const double log_m[3] = {target.near, target.wrong, target.rest};
    double offset[3], reference = kNothing<double>;
    for (int i = 0; i < 3; ++i) {
      offset[i] = mass[i] == kNothing<double> ? kNothing<double> : at[i] + (log_m[i] - (mass[i] - total));
      if (offset[i] > reference) reference = offset[i];
    }
    if (reference == kNothing<double>) return;  // no class can happen: m_t says so
    state.z_tau = state.a = state.impossible = 0;
    for (int i = 0; i < 3; ++i) {
      const double down = offset[i] - reference, factor = std::exp(down * inv_tau);
      if (offset[i] == kNothing<double>) continue;
      state.z_tau += factor * parts[i].z_tau;
      state.a += factor * (parts[i].a + parts[i].z_tau * (down * inv_tau));
      state.impossible = max(state.impossible, parts[i].impossible);
    }
    state.near = offset[0] - reference;
    state.wrong = offset[1] - reference;
    state.rest = offset[2] - reference;
    if (state.m_t == kNothing<double>) state.m_t = 0;  // the rest is empty, the row is not
    state.relaxed = target.no_near || target.all_wrong || out_of_reach;
    if (state.relaxed != 0 && !rows.constraints.relax) report(row);
    if (!statistics) return;
    const double log_all = tempered ? log_total : total;
    state.confidence = std::exp(load(rows.target, row, k) - log_all);
    if (!rows.labelled(row)) return;
    const int set = begin(0) != end(0) ? 0 : 2;  // where the label is
    state.prob = std::exp(state.t_y - log_all);
    state.target = std::exp(seen(state.t_y) - mass[set] + log_m[set]);
    for (int i = 0; i < 3; ++i) state.moved += max(0.0, std::exp(log_m[i]) - std::exp(mass[i] - total));
  }

  void report(int64_t row) const {
    int64_t first = unmet->load();
    while (row < first && !unmet->compare_exchange_weak(first, row)) {
    }
  }

  void pack(const State& s, int64_t row, const Outputs& out) const {
    if (!out.state) return;
    base.pack(s, row, out, columns);
    const double values[kProjectedColumns] = {s.beta,       s.centre, s.near,   s.wrong, s.rest,
                                              s.confidence, s.prob,   s.target, s.moved, s.relaxed};
    for (int i = 0; i < kProjectedColumns; ++i) put(out.state, wide, row * columns + kStudentColumns + i, values[i]);
  }

  State unpack(int64_t row, const Outputs& from) const {
    double v[kProjectedColumns];
    for (int i = 0; i < kProjectedColumns; ++i) v[i] = get(from.state, wide, row * columns + kStudentColumns + i);
    State state;
    static_cast<StudentState<double>&>(state) = base.unpack(row, from, columns);
    state.beta = v[0];
    state.centre = v[1];
    state.near = v[2];
    state.wrong = v[3];
    state.rest = v[4];
    return state;
  }

  Row finish_row(int64_t row, const State& state, double upstream) const {
    return base.finish_row(row, state, upstream);
  }

  bool keeps(int64_t row) const { return base.keeps(row); }
  bool keeps_in_gradient() const { return base.keeps_in_gradient(); }

  void map(int64_t row, int64_t column, int n, const State& state, const State* part, const Row& r, const Matrix& g,
           Kept kept) const {
    Row rest = r;
    rest.gradient.teacher_tau *= std::exp(state.rest / rows.value_at(row));
    const bool seen_again = !part || r.loss.impossible;  // else the exponentials know the view
    base.map(seen_again ? block(row, column, n, kept) : base.block(row, column, n, kept), row, column, state, part,
             rest, g);
  }

  void fix(int64_t row, const State& state, const Row& r, const Matrix& g) const {
    if (!rows.labelled(row)) return;
    const double inv_tau = 1 / rows.value_at(row);
    const double offset[2] = {state.near, state.wrong};
    const Element gradient(g, row);
    alignas(64) double values[kBlock];
    for (int i = 0; i < 2; ++i) {
      StudentBlockMap m{0,
                        state.m_s,
                        r.gradient.student_tau,
                        r.gradient.teacher_tau * std::exp(offset[i] * inv_tau),
                        r.gradient.student_one,
                        r.loss.impossible,
                        reinterpret_cast<char*>(values),
                        type()};
      each_part(sets[i], [&](int64_t j, int n) {
        sweeps().student_gradient(block(row, sets[i], j, n), m);
        for (int l = 0; l < n; ++l) gradient.store(begin(i)[j + l], get(values, wide, l));
      });
    }
    // The label in double: what is left of p_y - 1 on a confident row.
    const bool apart = begin(0) != end(0);
    const double reference = apart ? sets[0].m - state.near : state.m_t - state.rest;
    const double dt = state.t_y == kNothing<double> ? state.t_y : seen(state.t_y) - reference;
    const double g_y = element<0, 1, true>(r.gradient, dt, state.s_y - state.m_s, inv_tau);
    gradient.store(rows.labels[row], state.s_y == kNothing<double> ? g_y : g_y - r.gradient.label);
  }
};

}  // namespace
}  // namespace cudfast
