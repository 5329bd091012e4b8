// Rows with a target that meets bounds on its mass and entropy, on the CPU: see ../projected.h.
#pragma once

#include <atomic>
#include <vector>

#include "../projected.h"
#include "losses.h"
#include "set.h"
#include "threads.h"

namespace cudfast {
namespace {

struct ProjectedLossOfRows {
  // Of a block of the rest, then of the row.
  struct State : ProjectedState {
    double e_one = 0;  // sum exp(t - m_t) (t - m_t)
  };
  using Row = StudentLossOfRows::Row;

  StudentLossOfRows base;
  const Rows& rows;
  bool wide;
  bool statistics;
  std::atomic<int64_t>* unmet;  // the first row whose bounds are infeasible, or N

  // ---- One row, see prepared() ----
  Set sets[2];                  // near, wrong: those that are summed separately
  double tops[2] = {0, 0};      // the largest t' of each
  const int64_t* near[2] = {};  // N(y), also if it is not summed separately
  bool wrong_is_k = false;      // the wrong set is the top-1 alone
  int64_t k = 0;                // the teacher's top-1, if it is needed
  View view;
  double log_one = 0;                                            // log sum exp t, if the entropy has a bound
  enum { unknown, with_top1, trying, settled } stage = unknown;  // see again()
  Search search = {};

  ProjectedLossOfRows(const StudentLossOfRows& of, std::atomic<int64_t>* first_unmet)
      : base(of), rows(of.rows), wide(of.wide), statistics((of.needs & kTeacherOne) != 0), unmet(first_unmet) {
    base.needs |= kStudentOne | kTeacherOne;  // the masses are sums at temperature 1
    for (Set& set : sets) set.wide = wide;
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

  // The same loss for one row and its sets. `packed`: the state from an earlier call.
  ProjectedLossOfRows prepared(int64_t row, const State* packed) const {
    ProjectedLossOfRows own = *this;
    own.find_sets(row);
    if (packed) {
      own.view.beta = packed->beta;
      own.view.centre = packed->centre;
      own.set_top1(row, packed->k);
      own.gather(row);
      own.see();
      own.stage = settled;
    }
    return own;
  }

  void find_sets(int64_t row) {
    if (!rows.labelled(row)) return;
    const Constraints& c = rows.constraints;
    const int64_t* y = rows.labels + row;
    near[0] = c.near.offsets ? c.near.indices + c.near.offsets[*y] : y;
    near[1] = c.near.offsets ? c.near.indices + c.near.offsets[*y + 1] : y + 1;
    if (!std::isnan(bound(row, 0))) set_to(0, near[0], near[1]);
    if (!std::isnan(bound(row, 1)) && c.wrong.offsets) {
      set_to(1, c.wrong.indices + c.wrong.offsets[*y], c.wrong.indices + c.wrong.offsets[*y + 1]);
    }
  }

  void set_to(int i, const int64_t* from, const int64_t* to) {
    sets[i].begin = from;
    sets[i].end = to;
  }

  void gather(int64_t row) {
    const Element teacher_row(rows.target, row), student_row(rows.logits, row);
    for (int i = 0; i < 2; ++i) sets[i].gather(teacher_row, student_row, begin(i), end(i));
  }

  void see() {
    for (int i = 0; i < 2; ++i) {
      sets[i].see(view.beta);
      tops[i] = seen(sets[i].top);
    }
  }

  // A block with the members of a set in place of columns.
  StudentBlock block(int64_t row, const Set& set, int64_t j, int n) const {
    return set.block(base.block(row, 0, n, {}), j);
  }

  // The top-1 is the wrong class if the constraints request it and the top-1 is not near.
  void set_top1(int64_t row, int64_t top1) {
    k = top1;
    wrong_is_k = wants_top1(row) && !std::binary_search(near[0], near[1], k);
  }

  // The top-1 from the maxima of the rest's blocks and the sets. Ties go to the lowest index.
  int64_t find_top1(int64_t row, const std::vector<State>& parts) const {
    const auto lower = [](const State& a, const State& b) { return a.m_t < b.m_t; };
    const int64_t best = std::max_element(parts.begin(), parts.end(), lower) - parts.begin();
    double top = parts[static_cast<size_t>(best)].m_t;
    const Element teacher_row(rows.target, row);
    const int n = static_cast<int>(std::min<int64_t>(kBlock, rows.classes - best * kBlock));
    int64_t found = best * kBlock + sweeps().find(rows.target.at(row, best * kBlock), rows.target.dtype, wide, n, top);
    for (int i = 0; i < 2; ++i) {
      for (const int64_t* column = begin(i); column != end(i); ++column) {
        const double t = teacher_row.load(*column);
        if (t > top || (t == top && *column < found)) {
          top = t;
          found = *column;
        }
      }
    }
    return found;
  }

  // Called after the blocks are folded. Returns the block that must be folded again because the top-1 is summed
  // separately; or kEvery if the row must be folded at another temperature; or kNone.
  int64_t again(int64_t row, int threads, const std::vector<State>& parts) {
    if (stage == unknown) {
      stage = with_top1;
      if (wants_top1(row) || statistics) set_top1(row, find_top1(row, parts));
      if (wrong_is_k) return k / kBlock;
    }
    if (stage == settled) return kNone;
    if (stage == with_top1) gather(row);
    const double folded = view.beta;
    const bool first = stage != trying;
    stage = settled;
    if (bounds_entropy(row)) first ? start_search(row, threads, parts) : go_on(row, threads, parts);
    if (stage == settled) see();
    return stage == settled && view.beta == folded ? kNone : kEvery;
  }

  double seen(double t) const { return view.beta == 1 ? t : view.beta * (t - view.centre); }

  // ---- The temperature at which the entropy meets its bound ----

  using Tempered = TemperedState<double>;

  // The entropy at the temperature of the last fold, from its sums, without the slope.
  End<double> folded(int64_t row, const std::vector<State>& parts) {
    TeacherState<double> rest;  // of the teacher's logits
    for (const State& part : parts) rest = merge(rest, {part.m_t, part.z_one, part.e_one});
    const double top = rest.m_s == kNothing<double> ? 0 : rest.m_s, beta = view.beta;
    if (beta == 1) view.centre = top;
    const Tempered states[3] = {sets[0].tempered(beta),
                                sets[1].tempered(beta),
                                {beta == 1 ? top : view.centre + top / beta, rest.s_one, rest.e_s / beta}};
    if (beta == 1) log_one = log_total(states, beta);
    End<double> end = end_at(beta, states, low(row), high(row));
    end.found.slope = std::numeric_limits<double>::quiet_NaN();
    return end;
  }

  // One sweep over the teacher's row, at `count` temperatures.
  void look(int64_t row, int threads, const double* betas, int count, End<double>* ends) const {
    const size_t blocks = static_cast<size_t>(blocks_of(rows.classes));
    std::vector<TemperedBlockSums> parts(blocks * static_cast<size_t>(count));
    each_block(threads, rows.classes, [&](int64_t i, int64_t column, int n) {
      View part = part_of_view(column, n);
      for (int j = 0; j < count; ++j) {
        part.beta = betas[j];
        sweeps().tempered(teacher(row, column, n), part, parts[static_cast<size_t>(j) * blocks + i]);
      }
    });
    for (int j = 0; j < count; ++j) {
      Tempered states[3] = {sets[0].tempered(betas[j]), sets[1].tempered(betas[j]), {}};
      states[2].m = view.centre;
      for (size_t i = 0; i < blocks; ++i) Set::add(states[2], parts[static_cast<size_t>(j) * blocks + i]);
      ends[j] = end_at(betas[j], states, low(row), high(row));
    }
  }

  End<double> look(int64_t row, int threads, double beta) const {
    End<double> end;
    look(row, threads, &beta, 1, &end);
    return end;
  }

  void start_search(int64_t row, int threads, const std::vector<State>& parts) {
    search.wide = wide;
    const End<double> here = folded(row, parts);
    if (!search.misses(here.found.value, bound(row, 2), bound(row, 3))) return;
    const End<double> end = look(row, threads, search.places[0]);
    if (!search.reaches(end)) {
      view.beta = search.beta;
      return;
    }
    search.start(end, search.floor ? here : look(row, threads, 1));
    find_temperature(row, threads);
  }

  void go_on(int64_t row, int threads, const std::vector<State>& parts) {
    const End<double> end = folded(row, parts);
    if (!took(&end)) find_temperature(row, threads);
  }

  void find_temperature(int64_t row, int threads) {
    End<double> ends[kPlaces];
    do {
      if (search.step()) stage = trying;
      view.beta = search.beta;
      if (stage != trying) look(row, threads, search.places, search.count, ends);
    } while (stage != trying && !took(ends));
  }

  bool took(const End<double>* ends) {
    const bool over = search.took(ends);
    view.beta = search.beta;
    return over;
  }

  // ---- Functions that the driver calls ----

  StudentBlock block(int64_t row, int64_t column, int n, Kept kept) const {
    StudentBlock b = base.block(row, column, n, kept);
    b.view = part_of_view(column, n);
    return b;
  }

  State fold(int64_t row, int64_t column, int n, Kept kept) const {
    StudentBlock b = block(row, column, n, kept);
    if (stage != settled && bounds_entropy(row)) b.needs |= kTeacherEntropy;
    StudentBlockState part;
    sweeps().student_state(b, part);
    State state;
    static_cast<StudentState<double>&>(state) = base.state_of(part, column);
    state.e_one = part.e_one;
    return state;
  }

  State merged(int64_t row, const State& left, const State& right) const {
    State state;
    static_cast<StudentState<double>&>(state) = base.merged(row, left, right);
    return state;
  }

  void complete(int64_t row, State& state) const {
    const double inv_tau = 1 / rows.temperature_at(row);
    if (rows.labelled(row)) {
      state.t_y = load(rows.target, row, rows.labels[row]);
      state.s_y = load(rows.logits, row, rows.labels[row]);
    }
    state.k = k;
    state.beta = view.beta;
    state.centre = view.centre;
    Apart apart{{}, {tops[0], tops[1]}, begin(0) != end(0), low(row), high(row)};
    for (int i = 0; i < 2; ++i) {
      StudentState<double>& sums = apart.sums[i];
      sets[i].each_block(
          [&](int64_t j, int n) { sums = base.merged(row, sums, base.fold(block(row, sets[i], j, n), 0)); });
      sums = move(sums, sums.m_t, state.m_s, inv_tau);
    }
    cudfast::complete(state, apart, inv_tau, search.out_of_reach, statistics, log_one, load(rows.target, row, k));
    if (state.relaxed != 0 && !rows.constraints.relax) report(row);
  }

  void report(int64_t row) const {
    int64_t first = unmet->load();
    while (row < first && !unmet->compare_exchange_weak(first, row)) {
    }
  }

  void pack(const State& s, int64_t row, const Outputs& out) const {
    cudfast::pack(s, out, wide, row, base.terms.entropy);
  }

  State unpack(int64_t row, const Outputs& from) const {
    return {unpack_projected(from, wide, row, base.terms.entropy), 0};
  }

  Row finish(int64_t row, const State& state, double upstream) const { return base.finish(row, state, upstream); }

  bool keeps(int64_t row) const { return base.keeps(row); }
  bool keeps_in_gradient() const { return base.keeps_in_gradient(); }

  void map(int64_t row, int64_t column, int n, const State& state, const State* part, const Row& r, const Matrix& g,
           Kept kept) const {
    Row rest = r;
    rest.gradient.teacher_tau *= std::exp(state.rest / rows.temperature_at(row));
    const bool seen_again = !part || r.target.impossible;  // else the kept exponentials include the view
    base.map(seen_again ? block(row, column, n, kept) : base.block(row, column, n, kept), row, column, state, part,
             rest, g);
  }

  void fix(int64_t row, const State& state, const Row& r, const Matrix& g) const {
    if (!rows.labelled(row)) return;
    const double inv_tau = 1 / rows.temperature_at(row);
    const double offset[2] = {state.near, state.wrong};
    const Element gradient(g, row);
    alignas(64) double values[kBlock];
    for (int i = 0; i < 2; ++i) {
      StudentBlockMap m = base.map_of(state, r, reinterpret_cast<char*>(values), sets[i].type());
      m.m_t = 0;
      m.teacher_tau *= std::exp(offset[i] * inv_tau);
      sets[i].each_block([&](int64_t j, int n) {
        sweeps().student_gradient(block(row, sets[i], j, n), m);
        for (int l = 0; l < n; ++l) gradient.store(begin(i)[j + l], get(values, wide, l));
      });
    }
    gradient.store(rows.labels[row], label_gradient(state, r, begin(0) != end(0), tops[0], inv_tau));
  }
};

}  // namespace
}  // namespace cudfast
