// The functions of one instruction set: the two sweeps over a block of columns. Plain data only, because the code for
// every instruction set includes this header and is linked together.
#pragma once

#include "../launch.h"

namespace cudfast {

// Columns per block. Results do not depend on threads because blocks always start at multiples of it; two blocks of f32
// (16 KiB) stay in any first-level cache between the pass for the maximum and the sums.
constexpr int kBlock = 2048;

// Memory for a block's exponentials between the two sweeps: n values of the computing type each, or null.
struct Kept {
  char* teacher = nullptr;
  char* student = nullptr;
};

// The teacher's logits of a projection: beta (t - centre), and -inf in columns that are summed separately.
struct View {
  const int64_t* apart[2][2] = {};  // two ascending lists of columns of the row, [begin, end) within the block
  int64_t column = 0;               // the block's first column
  double centre = 0;
  double beta = 1;

  bool plain() const { return beta == 1 && apart[0][0] == apart[0][1] && apart[1][0] == apart[1][1]; }
};

struct StudentBlock {
  const char* s;  // (n,) student logits
  const char* t;  // (n,) teacher logits
  DType s_dtype;
  DType t_dtype;
  bool wide;  // compute in f64
  int n;      // <= kBlock
  int power;  // the temperature if it is 1, 2 or 4, else 0
  int needs;  // a mask of Needs: see row/state.h
  double inv_tau;
  Kept kept;
  const char* g;  // null, or memory that will be written soon: prefetched during the arithmetic
  DType g_dtype;
  View view = {};
};

// Sums of a block relative to its own maxima.
struct StudentBlockState {
  double m_t, m_s, z_tau, s_tau, a, s_one, z_one, impossible, e_one, e_s;
};

// The map of the second sweep. `holes` zeroes classes where the student is -inf. From kept exponentials, which are
// relative to the block's own maxima, the coefficients are the block's own, too, and m_s is the row's.
struct StudentBlockMap {
  double m_t, m_s, student_tau, teacher_tau, student_one, student_log, log_z;
  bool holes;
  char* g = nullptr;  // (n,)
  DType g_dtype = DType::f32;
  bool stream = false;  // past the caches
};

// Rows with the sums of row/extended.h.
struct ExtendedBlock {
  double inv_t;         // 1 / tau_t; StudentBlock::inv_tau is the student's
  const char* weights;  // (n,) c_j in the computing type, or null
};
struct ExtendedBlockState : StudentBlockState {
  double b, missing, uniform, share, possible, s_two;
};
struct ExtendedBlockMap : StudentBlockMap {
  double reverse, uniform;
};

struct TeacherBlock {
  const char* s;  // (n,)
  DType dtype;
  bool wide;
  int n;
};

struct TeacherBlockState {
  double m_s, s_one, e_s;
};

struct TemperedBlockSums {
  double z, e, v;
};

struct TeacherBlockMap {
  double m_s, inv_z, log_z, one, log;
  char* g;
  DType g_dtype;
  bool stream = false;
};

struct ExtendedTeacherBlockState : TeacherBlockState {
  double s_two, uniform, share, possible;
};
struct ExtendedTeacherBlockMap : TeacherBlockMap {
  double uniform;
  const char* weights;  // (n,) c_j in the computing type, or null
};

struct ExtendedSweeps {
  void (*student_state)(const StudentBlock&, const ExtendedBlock&, ExtendedBlockState&);
  void (*student_gradient)(const StudentBlock&, const ExtendedBlock&, const ExtendedBlockMap&);
  void (*teacher_state)(const TeacherBlock&, const char* weights, ExtendedTeacherBlockState&);
  void (*teacher_gradient)(const TeacherBlock&, const ExtendedTeacherBlockMap&);
};

struct Sweeps {
  const char* isa;
  bool streams;  // whether `stream` is supported
  void (*student_state)(const StudentBlock&, StudentBlockState&);
  void (*student_gradient)(const StudentBlock&, const StudentBlockMap&);
  void (*teacher_state)(const TeacherBlock&, TeacherBlockState&);
  void (*teacher_gradient)(const TeacherBlock&, const TeacherBlockMap&);
  const ExtendedSweeps& (*extended)();
  // The teacher's logits alone, for a projection: their sums relative to view.centre at view.beta, which may be 0.
  void (*tempered)(const TeacherBlock& b, const View& view, TemperedBlockSums& out);
  int (*find)(const char* from, DType dtype, bool wide, int n, double value);  // first index of `value`, else 0
  void (*exp32)(const float* x, float* y, int64_t n);                          // for tests
  void (*exp64)(const double* x, double* y, int64_t n);
};

const Sweeps& sweeps_baseline();
const ExtendedSweeps& extended_sweeps_baseline();
#if defined(CUDFAST_X86)
const Sweeps& sweeps_avx2();
const Sweeps& sweeps_avx512();
const ExtendedSweeps& extended_sweeps_avx2();
const ExtendedSweeps& extended_sweeps_avx512();
#endif

// The instruction set in use: chosen once, from the processor and CUDFAST_ISA.
const Sweeps& sweeps();

// Names of the sets that this processor can run, best last.
const char* const* runnable(int& count);

// For tests: uses the named set from now on; false if it is unknown or cannot run on this processor.
bool use(const char* isa);

// The reason why CUDFAST_ISA was not honoured, or "".
const char* isa_warning();

// Time of the comparison with the baseline, which ran before the instruction set was first used.
double isa_check_seconds();

}  // namespace cudfast
