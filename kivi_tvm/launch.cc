// Runs the parallel loops of the library that it is linked into on another pool than TVM's: that of
// the OpenMP runtime which torch computes with. Two pools of as many threads as there are cores
// take turns at best: the one that has just worked still spins while the other is woken.

#include <cstdint>

namespace {

// What TVM's generated code calls a parallel loop with (tvm/runtime/c_backend_api.h).
struct Group {
  void *sync_handle;
  int32_t num_task;
};
using Lambda = int (*)(int task, Group *group, void *data);

// The functions of an OpenMP runtime, as compilers call them.
using Parallel = void (*)(void (*body)(void *), void *data, unsigned threads, unsigned flags);
using Number = int (*)();

Parallel parallel = nullptr;
Number thread_number = nullptr;
Number team_size = nullptr;
Number max_threads = nullptr;

struct Loop {
  Lambda lambda;
  void *data;
  Group group;
  int status;
};

// There may be fewer threads than tasks: a loop inside of another one's gets one.
void run_tasks(void *argument) {
  Loop *loop = static_cast<Loop *>(argument);
  const int team = team_size();
  for (int task = thread_number(); task < loop->group.num_task; task += team) {
    if (int status = loop->lambda(task, &loop->group, loop->data)) {
      __atomic_store_n(&loop->status, status, __ATOMIC_RELAXED);
    }
  }
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void kivi_tvm_use_openmp(void *functions[4]) {
  parallel = reinterpret_cast<Parallel>(functions[0]);
  thread_number = reinterpret_cast<Number>(functions[1]);
  team_size = reinterpret_cast<Number>(functions[2]);
  max_threads = reinterpret_cast<Number>(functions[3]);
}

// In the place of TVMBackendParallelLaunch: 0 tasks mean as many as the calling thread may use.
__attribute__((visibility("default"))) int kivi_tvm_launch(Lambda lambda, void *data, int tasks) {
  Loop loop = {lambda, data, {nullptr, tasks ? tasks : max_threads()}, 0};
  if (loop.group.num_task == 1) return lambda(0, &loop.group, data);
  parallel(run_tasks, &loop, loop.group.num_task, 0);
  return loop.status;
}
}
