// Rows with a target that meets bounds, see ../projected.h. A row is processed by a block or a cluster,
// which sweeps it until its temperature is known; if rows are staged, all sweeps except the first read shared memory.
#pragma once

#include "../projected.h"
#include "kernels.h"
#include "sight.h"

namespace cudfast {
namespace {

template <class R_, bool Staged>
struct ProjectedKernel : RowKernel<Student<0, kAny, R_>, Staged> {
  using R = R_;
  using Loss = Student<0, kAny, R>;
  using F = typename Loss::F;
  using Plain = RowKernel<Loss, Staged>;
  using Parts = typename Plain::Parts;
  using Values = typename Plain::Values;
  using View = typename Plain::View;
  using Sees = Seeing<R, Chunks<Loss>>;
  using Plain::call;
  using Plain::loss;
  static constexpr bool wide = sizeof(R) == 8;

  // Sums of every set at an inverse temperature, relative to the set's own maximum.
  struct Tempered {
    TemperedSums<R> of[3];
  };

  // The purpose of the next evaluation of the entropy.
  enum class Looking { at_one, at_end, between, over };

  // A block's shared data, the same in all blocks of a cluster.
  struct Board : Plain::Board {
    ProjectedState state;
    Apart apart;
    double tops[2];         // the largest teacher's logits of the sets, -inf for an empty set
    int64_t first_top1[2];  // and the first columns of those
    int64_t alone;          // the top-1 if it is the wrong class, else -1
    Search search;
    Looking looking;
    Tempered sums;
    End<double> ends[kPlaces], one;  // of look(); at beta = 1
    double log_one;                  // log sum exp t
    Sight<R> sight;
  };

  CUDFAST_KERNEL static Board& board(Executor& x, Thread th) { return x.shared<Board>(th.rank); }
  // f(board) by one thread of every block.
  template <class G>
  CUDFAST_KERNEL static void once(Executor& x, G f) {
    x.each([&](Thread th) {
      if (th.index == 0) f(th, board(x, th));
    });
  }

  CUDFAST_KERNEL double bound(int row, int which) const {
    return call.rows.constraints.bounds[static_cast<int64_t>(row) * 4 + which];
  }
  CUDFAST_KERNEL static Members members(const ClassSets& sets, int64_t label) {
    return {sets.indices + sets.offsets[label], sets.indices + sets.offsets[label + 1]};
  }
  // N(y), also if its mass has no bound.
  CUDFAST_KERNEL Members near(int row, const Marks& m) const {
    const ClassSets& sets = call.rows.constraints.near;
    if (m.label < 0) return {};
    return sets.offsets ? members(sets, m.label) : Members{call.rows.labels + row, call.rows.labels + row + 1};
  }
  // Near or wrong classes that are summed separately.
  CUDFAST_KERNEL Members apart(Executor& x, Thread th, int row, const Marks& m, int set) const {
    if (m.label < 0 || std::isnan(bound(row, set))) return {};
    if (set == 0) return near(row, m);
    const ClassSets& wrong = call.rows.constraints.wrong;
    if (wrong.offsets) return members(wrong, m.label);
    const int64_t* const alone = &board(x, th).alone;
    return {alone, alone + (*alone >= 0 ? 1 : 0)};
  }

  // f(member) for the thread's share of a set.
  template <class G>
  CUDFAST_KERNEL static void each_member(Executor& x, Thread th, const Members& set, G f) {
    const int step = x.cluster() * x.threads();
    for (const int64_t* at = set.begin + th.rank * x.threads() + th.index; at < set.end; at += step) f(*at);
  }

  CUDFAST_KERNEL Sees seeing(Executor& x, Thread th, int row, const Marks& m, const View& view,
                             const Sight<R>& sight) const {
    return Sees(view.chunks, sight, apart(x, th, row, m, 0), apart(x, th, row, m, 1));
  }

  // Excludes near and wrong classes; the others are at the state's temperature.
  CUDFAST_KERNEL static Sight<R> rest_at(double beta, double centre) {
    const R none = kNothing<R>;
    return {static_cast<R>(beta), {R(0), R(0), beta == 1 ? R(0) : static_cast<R>(centre)}, {none, none, R(0)}};
  }

  // The rest's state, board.part. `first`: the first sweep over the row. `again`: only the thread with the column
  // board.alone computes a new share.
  CUDFAST_KERNEL void fold(Executor& x, int row, const Marks& m, Parts& part, bool first, bool again) const {
    const R inv_tau = static_cast<R>(1 / m.temperature);
    x.each([&](Thread th) {
      const View view = this->view(x, th, row);
      if (again) {
        const auto chunk = static_cast<int>((board(x, th).alone + view.chunks.shift) / Chunks<Loss>::width);
        if (chunk < view.chunks.begin || chunk >= view.chunks.end) return;
        if ((chunk - view.chunks.begin) % x.threads() != th.index) return;
      }
      typename Loss::Part own;
      const ProjectedState& state = board(x, th).state;
      Sees see = seeing(x, th, row, m, view, rest_at(state.beta, state.centre));
      const auto sweep = [&](int needs) {
        view.each(x, th, first, [&](int chunk, Values& v) {
          see(chunk, v);
          Loss::fold(own, v, chunk, inv_tau, needs);
        });
      };
      // The masses are sums at temperature 1. Two loops, because one for both takes too many registers.
      constexpr int ones = kStudentOne | kTeacherOne;
      loss.terms.entropy ? sweep(ones | kStudentEntropy) : sweep(ones);
      part[th] = own;
    });
    this->merge(x, row, m, part);
  }

  struct Best {
    double top = kNothing<double>;
    int64_t column = kBeaten;
  };
  CUDFAST_KERNEL static Best better(const Best& a, const Best& b) {
    return b.top > a.top || (b.top == a.top && b.column < a.column) ? b : a;
  }

  CUDFAST_KERNEL void find_tops(Executor& x, int row, const Marks& m) const {
    for (int i = 0; i < 2; ++i) {
      Executor::Local<Best> best(x);
      x.each([&](Thread th) {
        const View view = this->view(x, th, row);
        Best own;
        each_member(x, th, apart(x, th, row, m, i),
                    [&](int64_t column) { own = better(own, {view.rows[1].template load<double>(column), column}); });
        best[th] = own;
      });
      total(x, best, [](const Best& a, const Best& b) { return better(a, b); });
      x.each([&](Thread th) {
        if (th.index != 0) return;
        board(x, th).tops[i] = best[th].top;
        board(x, th).first_top1[i] = best[th].column;
      });
    }
  }

  // The top-1 is the wrong class if the constraints request it and the top-1 is not near.
  CUDFAST_KERNEL void set_alone(Executor& x, int row, const Marks& m) const {
    once(x, [&](Thread, Board& b) {
      const bool wanted =
          m.label >= 0 && !std::isnan(bound(row, 1)) && call.rows.constraints.top1 && !near(row, m).holds(b.state.k);
      b.alone = wanted ? b.state.k : -1;
    });
  }

  CUDFAST_KERNEL static void add(TemperedSums<F>& sums, R distance, R beta) {
    if (beta == 0) {
      cudfast::fold<true>(sums, F(distance), F(beta));
    } else {
      cudfast::fold<false>(sums, F(distance), F(beta));
    }
  }
  CUDFAST_KERNEL static TemperedSums<R> scalars(const TemperedSums<F>& sums) {
    return {scalar(sums.z), scalar(sums.e), scalar(sums.v)};
  }

  // One sweep over the teacher's row: board.ends at board.search.places.
  CUDFAST_KERNEL void look(Executor& x, int row, const Marks& m) const {
    struct Looks {
      TemperedSums<F> rest[kPlaces];
    };
    Executor::Local<Looks> looks(x);
    x.each([&](Thread th) {
      const View view = this->view(x, th, row);
      const Board& b = board(x, th);
      const int count = b.search.count;
      Looks own;
      R betas[kPlaces];
      CUDFAST_UNROLL
      for (int i = 0; i < kPlaces; ++i) {
        betas[i] = static_cast<R>(b.search.places[i]);
        own.rest[i] = {F(0), F(0), F(0)};
      }
      Sight<R> sight = rest_at(1, 0);
      sight.centre[2] = static_cast<R>(b.state.centre);
      Sees see = seeing(x, th, row, m, view, sight);
      view.template each<1>(x, th, false, [&](int chunk, Values& v) {
        see(chunk, v);
        CUDFAST_UNROLL
        for (int i = 0; i < kPlaces; ++i) {
          if (i >= count) break;
          CUDFAST_UNROLL
          for (int j = 0; j < Chunks<Loss>::width; ++j) add(own.rest[i], v[1][j], betas[i]);
        }
      });
      looks[th] = own;
    });
    const int count = x.shared<Board>(x.rank()).search.count;
    for (int i = 0; i < count; ++i) {
      Executor::Local<Tempered> sums(x);
      x.each([&](Thread th) {
        const View view = this->view(x, th, row);
        const Board& b = board(x, th);
        TemperedSums<R> rest{R(0), R(0), R(0)};
        CUDFAST_UNROLL
        for (int place = 0; place < kPlaces; ++place) {  // a computed index would move the array to memory
          const TemperedSums<R> there = scalars(looks[th].rest[place]);
          rest = {place == i ? there.z : rest.z, place == i ? there.e : rest.e, place == i ? there.v : rest.v};
        }
        Tempered own{{{}, {}, rest}};
        CUDFAST_UNROLL
        for (int set = 0; set < 2; ++set) {
          const R top = static_cast<R>(centred(b.tops[set])), beta = static_cast<R>(b.search.places[i]);
          TemperedSums<F> members{F(0), F(0), F(0)};
          each_member(x, th, apart(x, th, row, m, set),
                      [&](int64_t column) { add(members, view.rows[1].template load<R>(column) - top, beta); });
          own.of[set] = scalars(members);
        }
        sums[th] = own;
      });
      total(x, sums, [](const Tempered& a, const Tempered& b) {
        Tempered both;
        CUDFAST_UNROLL
        for (int set = 0; set < 3; ++set)
          both.of[set] = {a.of[set].z + b.of[set].z, a.of[set].e + b.of[set].e, a.of[set].v + b.of[set].v};
        return both;
      });
      x.each([&](Thread th) {
        if (th.index != 0) return;
        board(x, th).sums = sums[th];
        found(board(x, th), i);
      });
    }
  }

  CUDFAST_CALLED static void found(Board& b, int place) {
    TemperedState<double> sets[3];
    CUDFAST_UNROLL
    for (int set = 0; set < 3; ++set) {
      const TemperedSums<R>& from = b.sums.of[set];
      sets[set] = {set < 2 ? centred(b.tops[set]) : b.state.centre, static_cast<double>(from.z),
                   static_cast<double>(from.e), static_cast<double>(from.v)};
    }
    const double beta = b.search.places[place];
    if (beta == 1) b.log_one = log_total(sets, beta);
    b.ends[place] = end_at(beta, sets, b.apart.least, b.apart.most);
  }

  // Processes the results of look(); board.looking: the purpose of the next one.
  CUDFAST_CALLED static void go_on(Board& b, double least, double most) {
    const Looking now = b.looking;
    b.looking = Looking::over;
    if (now == Looking::at_one) {
      b.one = b.ends[0];
      if (b.search.misses(b.one.found.value, least, most)) b.looking = Looking::at_end;
    } else if (now == Looking::at_end) {
      if (!b.search.reaches(b.ends[0])) return;
      b.search.start(b.ends[0], b.one);
      b.looking = Looking::between;
    } else if (!b.search.took(b.ends)) {
      b.looking = Looking::between;
    }
    if (b.looking == Looking::between) b.search.step();
  }

  // The temperature at which the entropy meets its bound: state.beta.
  CUDFAST_KERNEL void find_temperature(Executor& x, int row, const Marks& m) const {
    once(x, [&](Thread, Board& b) {
      b.state.centre = centred(b.part.m_t);
      b.search.wide = wide;
      b.search.places[0] = 1;
      b.looking = Looking::at_one;
    });
    while (x.shared<Board>(x.rank()).looking != Looking::over) {
      look(x, row, m);
      once(x, [&](Thread, Board& b) { go_on(b, bound(row, 2), bound(row, 3)); });
    }
    once(x, [&](Thread, Board& b) { b.state.beta = b.search.beta; });
  }

  // The sums of the sets that are summed separately, at the state's temperature.
  CUDFAST_KERNEL void sum_sets(Executor& x, int row, const Marks& m) const {
    for (int i = 0; i < 2; ++i) {
      Executor::Local<typename Loss::Sums> sums(x);
      x.each([&](Thread th) {
        const View view = this->view(x, th, row);
        const Board& b = board(x, th);
        const R top = static_cast<R>(centred(b.tops[i])), beta = static_cast<R>(b.state.beta);
        const R c_s = static_cast<R>(centred(b.part.m_s)), inv_tau = static_cast<R>(1 / m.temperature);
        StudentSums<F> own{F(0), F(0), F(0), F(0), F(0), F(0), F(0), F(0)};
        each_member(x, th, apart(x, th, row, m, i), [&](int64_t column) {
          const R t = view.rows[1].template load<R>(column), s = view.rows[0].template load<R>(column);
          cudfast::fold<0, kStudentOne | kTeacherOne, kHoles>(own, F(beta * (t - top)), F(s - c_s), F(inv_tau));
        });
        sums[th].of = {scalar(own.z_tau), scalar(own.s_tau),      scalar(own.a), scalar(own.s_one),
                       scalar(own.z_one), scalar(own.impossible), R(0),          R(0)};
      });
      total(x, sums, [](const auto& a, const auto& b) { return Loss::sum(a, b); });
      x.each([&](Thread th) {
        if (th.index != 0) return;
        Board& b = board(x, th);
        const StudentSums<R>& from = sums[th].of;
        StudentState<double> s;
        s.m_t = b.tops[i] == kNothing<double> ? b.tops[i] : 0;
        s.m_s = b.part.m_s;
        s.z_tau = static_cast<double>(from.z_tau);
        s.a = static_cast<double>(from.a);
        s.z_one = static_cast<double>(from.z_one);
        s.impossible = static_cast<double>(from.impossible);
        b.apart.sums[i] = s;
        b.apart.tops[i] = b.state.seen(centred(b.tops[i]));
      });
    }
  }

  CUDFAST_CALLED static void complete(Board& b, double inv_tau, bool statistics, double t_k) {
    cudfast::complete(b.state, b.apart, inv_tau, b.search.out_of_reach, statistics, b.log_one, t_k);
  }

  // The state of a row, from its logits.
  CUDFAST_KERNEL void solve(Executor& x, int row, const Marks& m) const {
    Parts part(x);
    for (bool first = true, last = false;; first = false) {
      fold(x, row, m, part, first, !first && !last);
      if (last) break;
      find_tops(x, row, m);
      if (first) {
        once(x, [&](Thread, Board& b) {
          Best best{b.part.m_t, b.part.k};
          for (int i = 0; i < 2; ++i) best = better(best, {b.tops[i], b.first_top1[i]});
          b.state.k = best.column;
        });
        set_alone(x, row, m);
        if (x.shared<Board>(x.rank()).alone >= 0) continue;
      }
      once(x, [&](Thread th, Board& b) {
        b.apart.near = apart(x, th, row, m, 0).size() > 0;
        b.apart.least = b.apart.near ? bound(row, 0) : 0;
        b.apart.most = apart(x, th, row, m, 1).size() > 0 ? bound(row, 1) : 1;
      });
      // Read here: a flag from before the loop would take a register through all of it.
      if (m.label >= 0 && !(std::isnan(bound(row, 2)) && std::isnan(bound(row, 3)))) find_temperature(x, row, m);
      last = true;
      if (x.shared<Board>(x.rank()).state.beta == 1) break;
    }
    sum_sets(x, row, m);
    once(x, [&](Thread th, Board& b) {
      const View view = this->view(x, th, row);
      const int64_t k = b.state.k;
      static_cast<StudentState<double>&>(b.state) = b.part;
      b.state.k = k;
      b.state.s_k = view.rows[0].template load<double>(k);
      complete(b, 1 / call.rows.temperature_at(row), call.statistics, view.rows[1].template load<double>(k));
    });
  }

  // The values for a gradient that a packed state does not contain.
  CUDFAST_KERNEL void restore(Executor& x, int row, const Marks& m) const {
    once(x, [&](Thread, Board& b) { b.state = unpack_projected(call.out, wide, row, loss.terms.entropy); });
    set_alone(x, row, m);
    find_tops(x, row, m);
    once(x, [&](Thread th, Board& b) {
      b.apart.near = apart(x, th, row, m, 0).size() > 0;
      b.apart.tops[0] = b.state.seen(centred(b.tops[0]));
    });
  }

  CUDFAST_KERNEL void finish(Executor& x, int row, const Marks& m) const {
    once(x, [&](Thread th, Board& b) {
      const ProjectedState& s = b.state;
      end_of(call, loss.terms, row, m, wide, static_cast<const StudentState<double>&>(s), b.end);
      Fixes label;
      label.column[0] = m.label;
      if (m.label >= 0) label.value[0] = label_gradient(s, b.end, b.apart.near, b.apart.tops[0], 1 / m.temperature);
      set(b.map, s, b.end, label, m);
      b.map.c_t = 0;
      const double centre = (s.beta == 1 ? 0 : s.centre) + centred(s.m_t) / s.beta;
      b.sight = {static_cast<R>(s.beta),
                 {static_cast<R>(centred(b.tops[0])), static_cast<R>(centred(b.tops[1])), static_cast<R>(centre)},
                 {static_cast<R>(s.near), static_cast<R>(s.wrong), static_cast<R>(s.rest)}};
      if (this->writes(x, th) && call.from == From::logits) this->report(row, s, b.end.value);
    });
  }

  CUDFAST_KERNEL void operator()(Executor& x) const {
    const int row = x.block(0) / call.split;
    const auto marks = [&] { return cudfast::marks(call.rows, row); };  // read again, to save registers
    once(x, [&](Thread, Board& b) {
      b.state = {};
      b.search = {};
      b.alone = -1;
      b.log_one = 0;  // complete() takes it where nothing bounds the entropy, too
      b.map = {};     // a row that does not count has no gradient
      b.sight = {};
    });
    if (marks().ignored) {
      x.each([&](Thread th) {
        if (this->writes(x, th) && call.from == From::logits) this->report(row, ProjectedState{}, 0);
      });
    } else if (call.from == From::logits) {
      solve(x, row, marks());
    } else {
      restore(x, row, marks());
    }
    if (!marks().ignored) finish(x, row, marks());
    if (!call.out.gradient.data) return;
    this->map(x, row,
              [&](Thread th, const View& view) { return seeing(x, th, row, marks(), view, board(x, th).sight); });
  }
};

}  // namespace
}  // namespace cudfast
