// The kernels. A row is processed by a block, by a cluster of blocks, or by several blocks in two launches; its chunks
// of columns are assigned to the threads of its blocks in turn. Staged: the first pass over a row copies it to shared
// memory and the second reads it there; else both read global memory.
#pragma once

#include "losses.h"

namespace cudfast {
namespace {

// The chunks of a row that one block processes. Chunks begin at line boundaries of the logits, so the row's first and
// last may be partial; if the rows of student and teacher have different alignment, all are treated as partial.
template <class Loss>
struct Chunks {
  static constexpr int width = Loss::chunk;
  int shift, begin, end;
  bool aligned;
  int64_t classes;

  template <class Rows>
  CUDFAST_KERNEL Chunks(const Rows& rows, int64_t classes, int piece, int pieces)
      : shift(rows[0].template shift<width>()),
        aligned(rows[Loss::arrays - 1].template shift<width>() == shift),
        classes(classes) {
    const int all = static_cast<int>((shift + classes + width - 1) / width), each = (all + pieces - 1) / pieces;
    begin = piece * each < all ? piece * each : all;
    end = begin + each < all ? begin + each : all;
  }
  CUDFAST_KERNEL int64_t column(int chunk) const { return static_cast<int64_t>(chunk) * width - shift; }
  // Elements [low, high) of a chunk belong to the row.
  CUDFAST_KERNEL int low(int chunk) const { return chunk == 0 ? shift : 0; }
  CUDFAST_KERNEL int high(int chunk) const {
    const int64_t left = classes - column(chunk);
    return left < width ? static_cast<int>(left) : width;
  }
  CUDFAST_KERNEL bool whole(int chunk) const { return low(chunk) == 0 && high(chunk) == width; }
  CUDFAST_KERNEL int64_t first() const { return begin == 0 ? 0 : column(begin); }
  CUDFAST_KERNEL int64_t last() const { return column(end) < classes ? column(end) : classes; }
};

// For totals over a cluster: that of a block, and that of all blocks.
struct Slots {
  double block[12], all[12];
};

// Replaces every thread's value with its cluster's total, summed in a fixed order. A block's shared data begin with
// Slots.
template <class T, class Add>
CUDFAST_KERNEL void total(Executor& x, Executor::Local<T>& values, Add add) {
  static_assert(sizeof(T) <= sizeof(Slots::block), "does not fit");
  x.reduce(values, add);
  if (x.cluster() == 1) return;
  x.each([&](Thread th) {
    if (th.index == 0) memcpy(x.shared<Slots>(th.rank).block, &values[th], sizeof(T));
  });
  x.join();
  x.each([&](Thread th) {
    if (th.index != 0) return;
    T sum = values[th], other;
    for (int rank = 0; rank < x.cluster(); ++rank) {
      memcpy(&other, x.shared<Slots>(rank).block, sizeof(T));
      sum = rank == 0 ? other : add(sum, other);
    }
    memcpy(x.shared<Slots>(th.rank).all, &sum, sizeof(T));
  });
  x.each([&](Thread th) { memcpy(&values[th], x.shared<Slots>(th.rank).all, sizeof(T)); });
  x.join();
}

template <class Loss, bool Staged>
struct RowKernel {
  using R = typename Loss::R;
  using State = typename Loss::State;
  using Rows = RowOf<Loss::dtype>[2];  // the logits, and those of the target if there is one
  using Values = typename Loss::Values;
  static constexpr int width = Loss::chunk, ahead = 4;  // groups of copies in flight

  // A block's shared data.
  struct Board {
    Slots slots;
    State part, whole;
    RowEnd<double> end;
    typename Loss::Map map;
  };

  Call call;
  Loss loss;

  // A thread's view of the row.
  struct View {
    Rows rows;
    RowOf<Loss::dtype> gradient;
    Chunks<Loss> chunks;
    int slots;

    CUDFAST_KERNEL static int bytes(const RowOf<Loss::dtype>& row) { return bytes_of(width, row.dtype()); }
    CUDFAST_KERNEL char* slot(Executor& x, Thread th, int array, int chunk) const {
      const int base = array == 0 ? 0 : slots * bytes(rows[0]);
      return x.staged(th, base + (chunk - chunks.begin) * bytes(rows[array]), bytes(rows[array]));
    }
    CUDFAST_KERNEL bool staged(int chunk) const { return chunks.aligned && chunks.whole(chunk); }

    CUDFAST_KERNEL void stage(Executor& x, Thread th, int chunk) const {
      if (chunk < chunks.end && staged(chunk)) {
        for (int a = 0; a < Loss::arrays; ++a) {
          char* const to = slot(x, th, a, chunk);
          const char* const from = rows[a].template lines<width>(chunks.column(chunk));
          for (int i = 0; i < bytes(rows[a]); i += 16) copy(to + i, from + i);
        }
      }
      commit_copies();
    }

    // For the arrays from `First` on.
    template <int First = 0>
    CUDFAST_KERNEL void load(Executor& x, Thread th, int chunk, Values& v) const {
      const int64_t column = chunks.column(chunk);
      if (staged(chunk)) {
        CUDFAST_UNROLL
        for (int a = First; a < Loss::arrays; ++a) {
          const char* const from = Staged ? slot(x, th, a, chunk) : rows[a].template lines<width>(column);
          widen(from, rows[a].dtype(), v[a]);
        }
        return;
      }
      const int low = chunks.low(chunk), high = chunks.high(chunk);
      CUDFAST_UNROLL
      for (int j = 0; j < width; ++j) {
        const bool inside = j >= low && j < high;
        for (int a = First; a < Loss::arrays; ++a) {
          v[a][j] = inside ? rows[a].template load<R>(column + j) : kNothing<R>;
        }
      }
    }

    // f(chunk, values) for the thread's chunks; `copies`: they are staged ahead of it.
    template <int First = 0, class F>
    CUDFAST_KERNEL void each(Executor& x, Thread th, bool copies, F f) const {
      int next = chunks.begin + th.index;
      if (Staged && copies) {
        for (int i = 0; i < ahead; ++i, next += x.threads()) stage(x, th, next);
      }
      for (int chunk = chunks.begin + th.index; chunk < chunks.end; chunk += x.threads()) {
        if (Staged && copies) {
          stage(x, th, next);
          next += x.threads();
          wait_for_copies<ahead>();
        }
        Values v;
        load<First>(x, th, chunk, v);
        f(chunk, v);
      }
    }

    CUDFAST_KERNEL void store(int chunk, const R (&g)[width]) const {
      const int64_t column = chunks.column(chunk);
      if (chunks.whole(chunk) && gradient.template shift<width>() == chunks.shift) {
        narrow(g, gradient.dtype(), gradient.template lines<width>(column));
        return;
      }
      const int low = chunks.low(chunk), high = chunks.high(chunk);
      CUDFAST_UNROLL
      for (int j = 0; j < width; ++j) {
        if (j >= low && j < high) gradient.store(column + j, g[j]);
      }
    }
  };

  CUDFAST_KERNEL int piece(Executor& x, Thread th) const { return x.block(th.rank) % call.split; }

  CUDFAST_KERNEL View view(Executor& x, Thread th, int row) const {
    const Matrix& target = Loss::arrays == 2 ? call.rows.target : call.rows.logits;
    const Matrix& g = call.out.gradient.data ? call.out.gradient : call.rows.logits;
    const Rows rows = {{call.rows.logits, row, call.rows.classes}, {target, row, call.rows.classes}};
    return {{rows[0], rows[1]},
            {g, row, call.rows.padded},
            {rows, call.rows.classes, piece(x, th), call.split},
            call.slots};
  }

  CUDFAST_KERNEL bool writes(Executor& x, Thread th) const { return th.index == 0 && piece(x, th) == 0; }
  CUDFAST_KERNEL State* parts() const { return static_cast<State*>(call.parts); }

  using Parts = Executor::Local<typename Loss::Part>;

  // Each thread's share.
  CUDFAST_KERNEL void fold(Executor& x, int row, const Marks& m) const {
    const R inv_tau = static_cast<R>(1 / m.temperature);
    const int needs = needs_of(loss.terms, call.statistics);
    Parts part(x);
    x.each([&](Thread th) {
      typename Loss::Part own;
      view(x, th, row).each(x, th, true, [&](int chunk, Values& v) { Loss::fold(own, v, chunk, inv_tau, needs); });
      part[th] = own;
    });
    merge(x, row, m, part);
  }

  // The merge of the threads' shares: board.part becomes the state of the cluster's columns.
  CUDFAST_KERNEL void merge(Executor& x, int row, const Marks& m, Parts& part) const {
    const R inv_tau = static_cast<R>(1 / m.temperature);
    Executor::Local<typename Loss::Top> top(x);
    Executor::Local<typename Loss::Sums> sums(x);
    x.each([&](Thread th) { top[th] = Loss::top(part[th]); });
    total(x, top, [](const auto& a, const auto& b) { return Loss::higher(a, b); });
    x.each([&](Thread th) {
      const View view = this->view(x, th, row);
      sums[th] = Loss::around(part[th], top[th], inv_tau, [&](int array, int chunk, R value) {
        for (int j = view.chunks.low(chunk); j < view.chunks.high(chunk); ++j) {
          const int64_t column = view.chunks.column(chunk) + j;
          if (view.rows[array].template load<R>(column) == value) return column;
        }
        return kBeaten;
      });
    });
    total(x, sums, [](const auto& a, const auto& b) { return Loss::sum(a, b); });
    x.each([&](Thread th) {
      if (th.index != 0) return;
      const View view = this->view(x, th, row);
      const bool all = x.cluster() > 1;  // a cluster processes whole rows
      x.shared<Board>(th.rank).part = Loss::state(top[th], sums[th], view.rows, all ? 0 : view.chunks.first(),
                                                  all ? call.rows.classes : view.chunks.last(), m.label);
    });
  }

  // The state of a row: from this launch, from its parts in memory, or from an earlier call. Parts are merged like the
  // shares of threads.
  CUDFAST_KERNEL void collect(Executor& x, int row, const Marks& m, Executor::Local<State>& whole) const {
    const int count = call.from == From::parts ? call.part_count : 1;
    CUDFAST_CHECK(count <= x.threads());
    Executor::Local<typename Loss::template TopOf<double>> top(x);
    x.each([&](Thread th) {
      State own;
      if (call.from == From::parts) {
        if (th.index < count) own = parts()[static_cast<int64_t>(row) * count + th.index];
      } else if (th.index == 0) {
        own = call.from == From::state ? Loss::unpack(call.out, sizeof(R) == 8, row, loss.terms.entropy)
                                       : x.shared<Board>(th.rank).part;
      }
      whole[th] = own;
      top[th] = Loss::top(own);
    });
    if (count == 1) return;
    x.reduce(top, [](const auto& a, const auto& b) { return Loss::higher(a, b); });
    x.each([&](Thread th) { whole[th] = Loss::seen(whole[th], top[th], m.temperature); });
    x.reduce(whole, [](const State& a, const State& b) { return join(a, b); }, Loss::nothing());
  }

  template <class S>
  CUDFAST_KERNEL void report(int row, const S& state, double value) const {
    pack(state, call.out, sizeof(R) == 8, row, loss.terms.entropy);
    if (call.out.loss) static_cast<double*>(call.out.loss)[row] = value;
  }

  // The first thread of every block finishes the row; that of the first block writes the results.
  CUDFAST_KERNEL void finish(Executor& x, int row, const Marks& m) const {
    Executor::Local<State> whole(x);
    collect(x, row, m, whole);
    x.each([&](Thread th) {
      if (th.index != 0) return;
      Board& board = x.shared<Board>(th.rank);
      board.whole = whole[th];
      cudfast::finish(call, loss.terms, row, sizeof(R) == 8, board.whole, board.end, board.map);
      if (!writes(x, th) || call.from == From::state) return;
      report(row, board.whole, board.end.value);
    });
  }

  // An excluded row has no gradient.
  CUDFAST_KERNEL void skip(Executor& x, int row) const {
    x.each([&](Thread th) {
      if (th.index == 0) x.shared<Board>(th.rank).map = {};
      if (writes(x, th) && call.from != From::state) report(row, State{}, 0);
    });
  }

  // Each thread's share again: the gradient, zeros in excluded rows and in padding. see(thread, view) returns the
  // function that changes the values of a thread's chunks before they are mapped.
  template <class See>
  CUDFAST_KERNEL void map(Executor& x, int row, See see) const {
    x.join();  // the gradient may overwrite the logits, of which other blocks read single elements until here
    x.each([&](Thread th) {
      const View view = this->view(x, th, row);
      const typename Loss::Map map = x.shared<Board>(th.rank).map;
      auto seen = see(th, view);
      for (int chunk = view.chunks.begin + th.index; chunk < view.chunks.end; chunk += x.threads()) {
        R g[width] = {};
        if (map.counts) {
          Values v;
          view.load(x, th, chunk, v);
          seen(chunk, v);
          Loss::map(map, v, g);
          for (int i = 0; i < 2; ++i) {
            const int64_t at = map.column[i] - view.chunks.column(chunk);
            if (map.column[i] < 0 || at < 0 || at >= width) continue;
            CUDFAST_UNROLL
            for (int j = 0; j < width; ++j) g[j] = j == at ? map.value[i] : g[j];
          }
        }
        view.store(chunk, g);
      }
      if (piece(x, th) != call.split - 1) return;
      for (int64_t j = call.rows.classes + th.index; j < call.rows.padded; j += x.threads())
        view.gradient.store(j, R(0));
    });
  }

  CUDFAST_KERNEL void operator()(Executor& x) const {
    const int row = x.block(0) / call.split;
    const Marks m = marks(call.rows, row);
    if (!m.ignored) {
      if (call.from == From::logits) fold(x, row, m);
      if (call.only_parts) {
        x.each([&](Thread th) {
          if (th.index == 0) parts()[x.block(th.rank)] = x.shared<Board>(th.rank).part;
        });
        return;
      }
      finish(x, row, m);
    } else if (call.only_parts) {
      return;
    } else {
      skip(x, row);
    }
    if (!call.out.gradient.data) return;
    map(x, row, [](Thread, const View&) { return [](int, Values&) {}; });
  }
};

// Sums of the rows' weights, by one block.
struct CountKernel {
  Rows rows;
  double* divisors;  // (2,)

  using Weights = RowWeights<double>;
  CUDFAST_KERNEL static Weights sum(const Weights& a, const Weights& b) {
    return {a.rows + b.rows, a.labelled + b.labelled};
  }

  CUDFAST_KERNEL void operator()(Executor& x) const {
    Executor::Local<Weights> sums(x);
    x.each([&](Thread th) {
      Weights own;
      for (int64_t row = th.index; row < rows.rows; row += x.threads()) {
        own = sum(own, row_weights(rows.ignored(row), rows.labelled(row), rows.weight_at(row)));
      }
      sums[th] = own;
    });
    x.reduce(sums, [](const Weights& a, const Weights& b) { return sum(a, b); });
    x.each([&](Thread th) {
      if (th.index != 0) return;
      divisors[0] = sums[th].rows;
      divisors[1] = sums[th].labelled;
    });
  }
};

// A gradient times the upstream gradient. If that is 1, the gradient is not read; 0 remains 0, even times NaN.
struct ScaleKernel {
  Matrix gradient;
  int64_t columns;
  Upstream upstream;
  int split;  // blocks that share a row

  CUDFAST_KERNEL void operator()(Executor& x) const {
    x.each([&](Thread th) {
      const int row = x.block(th.rank) / split;
      const bool wide = gradient.dtype == DType::f64;
      const double by = get(upstream.data, wide, upstream.per_row ? row : 0);
      if (by == 1) return;
      const RowOf<kAny> g(gradient, row, columns);
      const int64_t step = static_cast<int64_t>(split) * x.threads();
      for (int64_t j = static_cast<int64_t>(x.block(th.rank) % split) * x.threads() + th.index; j < columns;
           j += step) {
        if (wide) {
          const double value = g.load<double>(j);
          if (value != 0) g.store(j, value * by);
        } else {
          const float value = g.load<float>(j);
          if (value != 0) g.store(j, value * static_cast<float>(by));
        }
      }
    });
  }
};

}  // namespace
}  // namespace cudfast
