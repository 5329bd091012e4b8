// A set of classes of a row that is summed separately: a short list of columns, and their logits, gathered.
#pragma once

#include <vector>

#include "losses.h"

namespace cudfast {
namespace {

struct Set {
  const int64_t* begin = nullptr;
  const int64_t* end = nullptr;
  bool wide = false;
  // Memory for the logits, in the computing type: the teacher's, t' relative to the largest once seen; the student's.
  std::vector<double> t, s;
  double top = 0;  // the largest of the teacher's logits, or 0 if there is none

  int64_t size() const { return static_cast<int64_t>(t.size()); }
  DType type() const { return wide ? DType::f64 : DType::f32; }

  // Reads the columns [from, to), after the sweep has loaded the row into a cache.
  void gather(const Element& teacher, const Element& student, const int64_t* from, const int64_t* to) {
    t.resize(static_cast<size_t>(to - from));
    s.resize(t.size());
    double largest = kNothing<double>;
    for (int64_t j = 0; j < size(); ++j) {
      const double value = teacher.load(from[j]);
      put(t.data(), wide, j, value);
      put(s.data(), wide, j, student.load(from[j]));
      largest = max(largest, value);
    }
    top = largest == kNothing<double> ? 0 : largest;
  }

  // Replaces t with t' relative to the set's own maximum, so that a large beta causes no loss of precision.
  void see(double beta) {
    for (int64_t j = 0; j < size(); ++j) put(t.data(), wide, j, beta * (get(t.data(), wide, j) - top));
  }

  // f(first member, members) for its blocks.
  template <class F>
  void each_block(F f) const {
    for (int64_t j = 0; j < size(); j += kBlock) f(j, static_cast<int>(std::min<int64_t>(kBlock, size() - j)));
  }

  const char* at(const std::vector<double>& memory, int64_t j) const {
    return reinterpret_cast<const char*>(memory.data()) + j * size_of(type());
  }
  TeacherBlock teacher(int64_t j, int n) const { return {at(t, j), type(), wide, n}; }

  // `like`, a block of a row, with members in place of its columns.
  StudentBlock block(StudentBlock like, int64_t j) const {
    like.s = at(s, j);
    like.t = at(t, j);
    like.s_dtype = like.t_dtype = type();
    return like;
  }

  // The sums at inverse temperature beta, before see().
  TemperedState<double> tempered(double beta) const {
    View around;
    around.centre = top;
    around.beta = beta;
    TemperedState<double> state;
    state.m = top;
    each_block([&](int64_t j, int n) {
      TemperedBlockSums part;
      sweeps().tempered(teacher(j, n), around, part);
      add(state, part);
    });
    return state;
  }

  static void add(TemperedState<double>& to, const TemperedBlockSums& part) {
    to.z += part.z;
    to.e += part.e;
    to.v += part.v;
  }
};

}  // namespace
}  // namespace cudfast
