#include "launch.h"

#include <algorithm>
#include <stdexcept>

namespace cudfast {

namespace {

constexpr int64_t kShortest = 4 * kMaxThreads;  // least chunks of a row for each block that shares it

bool one_dtype(const Rows& rows) { return !rows.target.data || rows.target.dtype == rows.logits.dtype; }
int arrays(const Rows& rows) { return rows.target.data ? 2 : 1; }

bool projected(const Rows& rows) { return rows.constraints.bounds != nullptr; }

// Several sweeps, one after another, by the one block or cluster that processes the row.
bool searched(const Call& call) { return projected(call.rows) && call.from == From::logits; }

// As in losses.h.
int width_of(const Rows& rows) {
  return one_dtype(rows) && !projected(rows) && rows.logits.dtype != DType::f64
             ? static_cast<int>(16 / size_of(rows.logits.dtype))
             : 8;
}

int64_t chunks_of(const Rows& rows) { return (rows.classes + 2 * width_of(rows) - 2) / width_of(rows); }

int threads_for(int64_t chunks, int most = kMaxThreads) {
  return static_cast<int>(std::min<int64_t>(most, (std::max<int64_t>(chunks, 1) + kWarp - 1) / kWarp * kWarp));
}

std::string text(const Call& call, const char* error) {
  static const char* const names[] = {"float32", "float64", "bfloat16", "float16"};
  const Rows& r = call.rows;
  std::string logits = names[static_cast<int>(r.logits.dtype)];
  if (r.target.data) logits += std::string(" and ") + names[static_cast<int>(r.target.dtype)];
  return std::string("the CUDA kernel of the ") + (r.target.data ? "student" : "teacher") + " loss on " +
         std::to_string(r.rows) + " x " + std::to_string(r.classes) + " logits (" + logits +
         ") was not launched: " + error;
}

void launch(RowLaunch run, const Call& call, const Terms& terms, const Machine& machine, void* stream,
            const Tuning& tuning) {
  Call own = call;
  const Grid grid = plan(call, machine, tuning);
  if (grid.cluster > 1) own.split = grid.cluster;
  if (grid.staged > 0) own.slots = static_cast<int>((chunks_of(call.rows) + grid.cluster - 1) / grid.cluster);
  if (call.rows.rows * own.split > std::numeric_limits<int>::max()) {
    throw std::runtime_error(text(call, "more blocks than a launch can have; pass fewer rows"));
  }
  if (const char* const error = run(own, terms, grid, stream)) throw std::runtime_error(text(call, error));
}

int kind_of(const Rows& rows) {
  return one_dtype(rows) && rows.logits.dtype != DType::f64 ? static_cast<int>(rows.logits.dtype)
                                                            : static_cast<int>(DType::f64);
}

}  // namespace

int shared_rows(int64_t rows, int64_t classes, int processors) {
  const int64_t chunks = classes / 8;
  if (rows >= 2 * processors) return 1;
  const int64_t most = std::min<int64_t>(kMaxThreads, (4 * processors + rows - 1) / std::max<int64_t>(rows, 1));
  return static_cast<int>(std::max<int64_t>(1, std::min(most, chunks / kShortest)));
}

Grid plan(const Call& call, const Machine& machine, const Tuning& tuning) {
  const Rows& rows = call.rows;
  const int64_t chunks = chunks_of(rows);
  Grid grid;
  grid.blocks = rows.rows * call.split;
  grid.threads = threads_for((chunks + call.split - 1) / call.split);
  const auto cluster_of = [&](int cluster) {
    grid.cluster = cluster;
    grid.blocks = rows.rows * cluster;
    grid.threads = threads_for((chunks + cluster - 1) / cluster, tuning.threads > 0 ? tuning.threads : kMaxThreads);
  };
  const bool fused = call.from == From::logits && call.out.gradient.data && !call.only_parts;
  if ((fused || searched(call)) && !rows.wide() && machine.capability >= 80) {
    int64_t bytes = width_of(rows) * size_of(rows.logits.dtype);
    if (arrays(rows) == 2) bytes += width_of(rows) * size_of(rows.target.dtype);
    const int most = std::max(machine.cluster, std::min(tuning.cluster, machine.widest));
    for (int cluster = std::max(1, std::min(tuning.cluster, most)); cluster <= most; cluster *= 2) {
      const int64_t slots = (chunks + cluster - 1) / cluster;
      if (slots * bytes + kHeaderBytes > machine.shared) continue;
      grid.staged = static_cast<int>(slots * bytes);
      cluster_of(cluster);
      return grid;
    }
  }
  if (searched(call)) {
    int cluster = 1;
    while (2 * cluster <= std::min(machine.cluster, shared_rows(rows.rows, rows.classes, machine.processors)))
      cluster *= 2;
    cluster_of(cluster);
  }
  return grid;
}

void sweep(const Kernels& kernels, const Call& given, const Terms& terms, const Machine& machine, void* stream,
           const Tuning& tuning) {
  Call call = given;
  const Rows& rows = call.rows;
  if (rows.rows == 0) return;
  const RowLaunch run = projected(rows)    ? kernels.projected
                        : rows.target.data ? kernels.student[kind_of(rows)]
                                           : kernels.teacher[kind_of(rows)];
  const int shared = shared_rows(rows.rows, rows.classes, machine.processors);
  if (searched(call)) return launch(run, call, terms, machine, stream, tuning);
  if (shared > 1 && call.from == From::logits) {
    call.part_count = call.split = shared;
    call.only_parts = true;
    launch(run, call, terms, machine, stream, tuning);
    call.only_parts = false;
    call.from = From::parts;
  }
  call.split = call.out.gradient.data ? shared : 1;
  launch(run, call, terms, machine, stream, tuning);
}

}  // namespace cudfast
