// CUDA kernels on a CPU, one work-group after the other: every thread is a context of its own, and
// what warps do together waits until all lanes have come.
//
// Written from the PTX manual (ISA 9.7.16.5.8 and 9.7.16.5.17), not from the package's own tables.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __CUDA_ARCH__ 900
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __shared__ static

using half = _Float16;
using uint = unsigned;
using ushort = unsigned short;
using uchar = unsigned char;
struct half2 { half x, y; };
struct alignas(8) half4 { half x, y, z, w; };
struct uint1 { uint x; };
struct alignas(8) uint2 { uint x, y; };
struct alignas(16) uint4 { uint x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct nv_bfloat16 {
  ushort bits;
  nv_bfloat16() = default;
  nv_bfloat16(float x) {
    uint u;
    memcpy(&u, &x, 4);
    bits = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  }
  operator float() const {
    uint u = uint(bits) << 16;
    float x;
    memcpy(&x, &u, 4);
    return x;
  }
};
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <class T> T __ldcg(const T* from) { return *from; }
struct nv_bfloat162 { nv_bfloat16 x, y; };
struct alignas(8) nv_bfloat164 { nv_bfloat16 x, y, z, w; };
struct Index { int x = 0, y = 0, z = 0; };

template <class T> T max(T a, T b) { return a > b ? a : b; }
template <class T> T min(T a, T b) { return a < b ? a : b; }

constexpr int LANES = 32;
constexpr int SHARED_BYTES = 227 << 10;  // of a work-group
static Index threadIdx, blockIdx;

struct Copy { void* to; const void* from; };

struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  Index index;
  bool done = false;
  std::vector<Copy> copies;  // that it has not waited for
};

struct Meeting {  // of the lanes of a warp, or of all threads
  int size, arrived = 0, number = 0;
};

static std::vector<Thread> threads;
static std::vector<Meeting> warps;
static Meeting group;
static ucontext_t scheduler;
static int current;
static std::function<void()> body;
static uint registers[64][LANES][10];  // of every warp's lanes, in passing

static void yield() { swapcontext(&threads[current].context, &scheduler); }

static void meet(Meeting& m) {
  int number = m.number;
  if (++m.arrived == m.size) {
    m.arrived = 0;
    ++m.number;
  }
  while (m.number == number) yield();
}

// As late as a kernel that waits allows.
static void copy_later(void* to, const void* from) { threads[current].copies.push_back({to, from}); }
static void arrive_copies() {
  for (auto copy : threads[current].copies) memcpy(copy.to, copy.from, 16);
  threads[current].copies.clear();
}

// What an earlier kernel still writes: every work-group finds it as it was before, until all of its
// threads wait for that kernel.
struct Change { char* at; std::vector<char> before, after; };
static std::vector<Change> changes;
static bool waited;

extern "C" void run_after(int count, char** at, char** after, const long* bytes) {
  changes.clear();
  for (int i = 0; i < count; ++i)
    changes.push_back({at[i], {at[i], at[i] + bytes[i]}, {after[i], after[i] + bytes[i]}});
}

static void wait_for_earlier() {
  if (changes.empty()) return;
  meet(group);
  if (!waited) {
    waited = true;
    for (auto& thread : threads) {  // copies may have been made by now
      for (auto copy : thread.copies) memcpy(copy.to, copy.from, 16);
      thread.copies.clear();
    }
    for (auto& change : changes) memcpy(change.at, change.after.data(), change.after.size());
  }
  meet(group);
}

static void __syncthreads() { meet(group); }
static void __syncwarp() { meet(warps[current / LANES]); }

template <class T> T __shfl_sync(uint mask, T value, int source, int width) {
  static_assert(sizeof(T) == 4);
  if (mask != 0xffffffff || width != LANES) abort();
  int warp = current / LANES;
  T found;
  memcpy(&registers[warp][current % LANES][0], &value, 4);
  __syncwarp();
  memcpy(&found, &registers[warp][source % width][0], 4);
  __syncwarp();
  return found;
}

template <class T> T __shfl_down_sync(uint mask, T value, int by, int width) {
  int lane = current % LANES;
  return __shfl_sync(mask, value, lane + by < LANES ? lane + by : lane, width);
}

template <class T> float element(uint pair, int number) {
  ushort bits = pair >> (16 * number);
  T x;
  memcpy(&x, &bits, 2);
  return x;
}

// d[16, 8] = a[16, 16] b[16, 8] + d. Lane l has groupID l >> 2 and threadID_in_group l % 4:
// a_i, i = 0 .. 7: row groupID, or groupID + 8 for i in {2, 3, 6, 7}; column
// threadID_in_group * 2 + (i & 1), 8 more for i >= 4. b_i: row threadID_in_group * 2 + (i & 1), 8
// more for i >= 2; column groupID. c_i: row groupID, 8 more for i >= 2; column
// threadID_in_group * 2 + (i & 1).
template <class T> void mma_m16n8k16(float* d, const uint* a, const uint* b) {
  auto& held = registers[current / LANES];
  int lane = current % LANES;
  memcpy(held[lane], a, 16);
  memcpy(held[lane] + 4, b, 8);
  __syncwarp();
  float found[4];
  for (int i = 0; i < 4; ++i) {
    int row = (lane >> 2) + 8 * (i >= 2), column = lane % 4 * 2 + (i & 1);
    double sum = d[i];
    for (int k = 0; k < 16; ++k) {
      int a_number = (k >= 8) * 4 + (row >= 8) * 2 + k % 2;
      int b_number = (k >= 8) * 2 + k % 2;
      uint a_pair = held[row % 8 * 4 + k % 8 / 2][a_number / 2];
      uint b_pair = held[column * 4 + k % 8 / 2][4 + b_number / 2];
      sum += double(element<T>(a_pair, a_number % 2)) * element<T>(b_pair, b_number % 2);
    }
    found[i] = sum;
  }
  __syncwarp();
  memcpy(d, found, 16);
}

static auto mma_m16n8k16_f16 = mma_m16n8k16<half>;
static auto mma_m16n8k16_bf16 = mma_m16n8k16<nv_bfloat16>;

// Row i of the matrix is in lanes 4 i .. 4 i + 3, two elements each.
static uint movmatrix_trans(uint x) {
  auto& held = registers[current / LANES];
  int lane = current % LANES;
  held[lane][0] = x;
  __syncwarp();
  uint found = 0;
  for (int i = 0; i < 2; ++i) {
    int row = lane % 4 * 2 + i, column = lane / 4;
    found |= (held[row * 4 + column / 2][0] >> (16 * (column % 2)) & 0xffff) << (16 * i);
  }
  __syncwarp();
  return found;
}

static void enter() {
  body();
  threads[current].done = true;
  yield();
}

// Run every work-group of `blocks` with x by y threads; 0 unless threads wait for each other.
static int launch(int blocks, int x, int y, std::function<void()> kernel) {
  body = kernel;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    threads = std::vector<Thread>(x * y);
    warps.assign(x * y / LANES, Meeting{LANES});
    group = Meeting{x * y};
    waited = false;
    for (auto& change : changes) memcpy(change.at, change.before.data(), change.before.size());
    for (int i = 0; i < x * y; ++i) {
      auto& thread = threads[i];
      thread.stack.resize(1 << 17);
      thread.index = {i % x, i / x, 0};
      getcontext(&thread.context);
      thread.context.uc_stack = {thread.stack.data(), 0, thread.stack.size()};
      makecontext(&thread.context, enter, 0);
    }
    for (int left = x * y, turns = 0; left; ++turns) {
      if (turns > 1000000) return 1;
      for (current = 0; current < x * y; ++current) {
        if (threads[current].done) continue;
        threadIdx = threads[current].index;
        swapcontext(&scheduler, &threads[current].context);
        left -= threads[current].done;
      }
    }
  }
  return 0;
}

#define alignas(bytes) __attribute__((aligned(bytes)))
