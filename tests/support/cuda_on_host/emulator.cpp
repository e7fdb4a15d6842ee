// Runs CUDA launches on the CPU, as strictly as CUDA is specified.
//
// A block's threads are fibers on one OS thread. A fiber runs until it waits for others, at a
// barrier or a warp call, and then hands back to run_block(), where all control is. The blocks of a
// launch run one after another, in the order that cuda_on_host_order() sets, as the threads do.
// What CUDA leaves undefined is thrown out of cudaLaunchKernelEx as std::runtime_error.
//
// An asynchronous copy lands, in ascending order, only where its thread waits for it, and in
// descending order, at once; in random order, either. Both show what lacks synchronisation.
//
// This file is never instrumented: what it does is no access of the kernels. With
// CUDA_ON_HOST_ADDRESS or CUDA_ON_HOST_THREAD it tells AddressSanitizer or ThreadSanitizer of
// fibers, of shared memory, and of the order that CUDA gives: the threads that meet at a barrier or
// a warp call are ordered by it, blocks not at all, and a launch comes after the one before. The
// calls of ptx_on_host.h give no order.

#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "ptx_on_host.h"

#ifdef CUDA_ON_HOST_ADDRESS
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef CUDA_ON_HOST_THREAD
#include <sanitizer/tsan_interface.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

#define VISIBLE extern "C" __attribute__((visibility("default")))

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// Shared memory, with a margin at either side that no kernel may touch.
constexpr size_t kMargin = 4096, kSharedOptin = 227 << 10, kShared = 48 << 10;
constexpr size_t kArena = kMargin + kSharedOptin + kMargin;
extern "C" {
alignas(4096) __attribute__((used)) char cuda_on_host_arena[kArena];
}
__asm__(
    ".globl fastgan_shared\n"
    ".hidden fastgan_shared\n"
    ".set fastgan_shared, cuda_on_host_arena + 4096\n");

namespace cuda_on_host {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kMaxThreads = 1024;
#ifdef CUDA_ON_HOST_THREAD
constexpr size_t kStacks = 2048;
#else
constexpr size_t kStacks = kMaxThreads;
#endif
constexpr size_t kPage = 4096, kStack = 256 << 10;

#ifdef __x86_64__

// What calls keep is on the stack; glibc's swapcontext would make a system call each time.
extern "C" void cuda_on_host_switch(void** from, void* to);
__asm__(
    ".text\n"
    ".type cuda_on_host_switch, @function\n"
    "cuda_on_host_switch:\n"
    "  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp\n"
    "  ret\n"
    ".size cuda_on_host_switch, . - cuda_on_host_switch\n");

class Context {
 public:
  void start(char* stack, size_t size, void (*function)()) {
    void** top = reinterpret_cast<void**>(stack + size);
    *--top = nullptr;  // where `function` would return to
    *--top = reinterpret_cast<void*>(function);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    at_ = top;
  }
  void switch_to(Context& other) { cuda_on_host_switch(&at_, other.at_); }

 private:
  void* at_;
};

#else

class Context {
 public:
  void start(char* stack, size_t size, void (*function)()) {
    getcontext(&at_);
    at_.uc_stack.ss_sp = stack;
    at_.uc_stack.ss_size = size;
    at_.uc_link = nullptr;
    makecontext(&at_, function, 0);
  }
  void switch_to(Context& other) { swapcontext(&at_, &other.at_); }

 private:
  ucontext_t at_;
};

#endif

enum class State { kReady, kAtBarrier, kAtWarpCall, kRefused, kReturned };

struct CopyOfGroup {
  Copy copy;
  uint64_t group;
};

struct Thread {
  Context context;
  char* stack;
  uint3 index;
  State state;
  Site site;
  // Of the warp call that it waits at, or was at last.
  WarpCall call;
  unsigned mask;
  uint64_t value;
  int operand, width;
  uint64_t result;
  // Of the call that is refused.
  const char *name, *why;
  std::vector<CopyOfGroup> copies;  // on their way
  uint64_t groups;
  void* sanitizers;  // its fake stack, or what ThreadSanitizer knows it by
};

struct Launch {
  unsigned grid[3], block[3];
  uint64_t shared;
};

struct {
  std::mutex busy;
  const std::function<void()>* thread;
  std::vector<Thread> threads;
  Thread* current;
  Context scheduler;
  size_t shared;
  char* stacks = nullptr;
  int order = 0;
  std::mt19937 random;
  cudaError_t last_error = cudaSuccess;
  std::vector<Launch> launches;
} emulator;

const char* name(WarpCall call) {
  switch (call) {
    case WarpCall::kShuffle: return "__shfl_sync";
    case WarpCall::kShuffleUp: return "__shfl_up_sync";
    case WarpCall::kShuffleDown: return "__shfl_down_sync";
    case WarpCall::kShuffleXor: return "__shfl_xor_sync";
    case WarpCall::kBallot: return "__ballot_sync";
    case WarpCall::kSync: return "__syncwarp";
    case WarpCall::kLoadMatrices:
    case WarpCall::kLoadTransposedMatrices: return "load_matrices";
    default: return "multiply_add";
  }
}

const char* name(const Thread& thread) {
  switch (thread.state) {
    case State::kAtBarrier: return "__syncthreads";
    case State::kRefused: return thread.name;
    default: return name(thread.call);
  }
}

std::string text(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

std::string text(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

std::string hexadecimal(unsigned mask) {
  char digits[11];
  std::snprintf(digits, sizeof digits, "0x%08x", mask);
  return digits;
}

bool same(Site a, Site b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

[[noreturn]] void refuse(const Thread& thread, const std::string& what) {
  throw std::runtime_error(text(thread.site) + ": " + name(thread) + " " + what + " (block " +
                           text(blockIdx) + ", thread " + text(thread.index) + ")");
}

#ifdef CUDA_ON_HOST_ADDRESS
void* scheduler_fake_stack;
const void* scheduler_stack;
size_t scheduler_stack_size;
#endif

#ifdef CUDA_ON_HOST_THREAD
// What ThreadSanitizer knows threads by, each with a stack of its own, dear to make and 8,128 at
// most. Launches use the same ones, each thread another as long as there are enough; a launch of
// more threads takes them in turn, and a race is missed between blocks so far apart.
std::vector<void*> fibers;
size_t fibers_used;
void* scheduler_fiber;
std::unique_ptr<char> launch_end;

void as_thread(const Thread& thread, void (*act)(void*), void* on) {
  __tsan_switch_to_fiber(thread.sanitizers, __tsan_switch_to_fiber_no_sync);
  act(on);
  __tsan_switch_to_fiber(scheduler_fiber, __tsan_switch_to_fiber_no_sync);
}
#endif

// What a fiber does to memory that is the scheduler's, and that is moved and freed as such.
struct AsScheduler {
#ifdef CUDA_ON_HOST_THREAD
  AsScheduler() { __tsan_switch_to_fiber(scheduler_fiber, __tsan_switch_to_fiber_no_sync); }
  ~AsScheduler() {
    __tsan_switch_to_fiber(emulator.current->sanitizers, __tsan_switch_to_fiber_no_sync);
  }
#else
  AsScheduler() {}
#endif
};

// All that any of them did comes before all that any of them will do.
void order_by_meeting(const std::vector<Thread*>& threads) {
#ifdef CUDA_ON_HOST_THREAD
  const auto meeting = std::make_unique<char>();
  for (Thread* thread : threads) as_thread(*thread, __tsan_release, meeting.get());
  for (Thread* thread : threads) as_thread(*thread, __tsan_acquire, meeting.get());
#else
  (void)threads;
#endif
}

void begin_launch(size_t shared) {
#ifdef CUDA_ON_HOST_ADDRESS
  __asan_unpoison_memory_region(cuda_on_host_arena, kArena);
#endif
  std::memset(cuda_on_host_arena, 0xff, kArena);
#ifdef CUDA_ON_HOST_ADDRESS
  __asan_poison_memory_region(cuda_on_host_arena, kArena);
  __asan_unpoison_memory_region(cuda_on_host_arena + kMargin, shared);
#endif
#ifdef CUDA_ON_HOST_THREAD
  scheduler_fiber = __tsan_get_current_fiber();
  launch_end = std::make_unique<char>();
  fibers_used = 0;
#endif
  (void)shared;
}

void end_launch() {
#ifdef CUDA_ON_HOST_ADDRESS
  __asan_poison_memory_region(cuda_on_host_arena, kArena);
  for (const Thread& thread : emulator.threads)  // where its frames are still
    if (thread.state != State::kReturned)
      __asan_unpoison_memory_region(thread.stack, kStack - kPage);
#endif
#ifdef CUDA_ON_HOST_THREAD
  for (const Thread& thread : emulator.threads)  // where they were abandoned
    if (thread.state != State::kReturned) as_thread(thread, __tsan_release, launch_end.get());
  __tsan_acquire(launch_end.get());
#endif
}

// Fresh shared memory for a block, all NaN in any dtype.
void make_shared(size_t bytes) {
  char* const memory = cuda_on_host_arena + kMargin;
#ifdef CUDA_ON_HOST_THREAD
  // What the block before did there is forgotten only with the mapping.
  const size_t pages = (bytes + kPage - 1) / kPage * kPage;
  if (pages && mmap(memory, pages, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED,
                    -1, 0) == MAP_FAILED)
    throw std::bad_alloc();
#endif
  std::memset(memory, 0xff, bytes);
}

void leave_fiber() {
  Thread& thread = *emulator.current;
#ifdef CUDA_ON_HOST_ADDRESS
  const bool for_good = thread.state == State::kReturned;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &thread.sanitizers, scheduler_stack,
                                 scheduler_stack_size);
#endif
#ifdef CUDA_ON_HOST_THREAD
  __tsan_switch_to_fiber(scheduler_fiber, __tsan_switch_to_fiber_no_sync);
#endif
  thread.context.switch_to(emulator.scheduler);
#ifdef CUDA_ON_HOST_ADDRESS
  __sanitizer_finish_switch_fiber(thread.sanitizers, &scheduler_stack, &scheduler_stack_size);
#endif
}

void fiber() {
#ifdef CUDA_ON_HOST_ADDRESS
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  (*emulator.thread)();
  emulator.current->state = State::kReturned;
  leave_fiber();
}

void make_stacks() {
  if (emulator.stacks) return;
  void* memory = mmap(nullptr, kStacks * kStack, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  emulator.stacks = static_cast<char*>(memory);
  for (size_t i = 0; i < kStacks; ++i) mprotect(emulator.stacks + i * kStack, kPage, PROT_NONE);
}

void start_threads() {
  for (size_t i = 0; i < emulator.threads.size(); ++i) {
    Thread& thread = emulator.threads[i];
    const unsigned row = unsigned(i) / blockDim.x;
    thread.index = {unsigned(i) % blockDim.x, row % blockDim.y, row / blockDim.y};
    thread.state = State::kReady;
    thread.copies.clear();
    thread.groups = 0;
    size_t stack = i;
    thread.sanitizers = nullptr;
#ifdef CUDA_ON_HOST_THREAD
    stack = fibers_used++ % kStacks;
    if (stack == fibers.size()) fibers.push_back(__tsan_create_fiber(0));
    thread.sanitizers = fibers[stack];
#endif
    thread.stack = emulator.stacks + stack * kStack + kPage;
    thread.context.start(thread.stack, kStack - kPage, fiber);
  }
#ifdef CUDA_ON_HOST_THREAD
  const auto start = std::make_unique<char>();
  __tsan_release(start.get());
  for (const Thread& thread : emulator.threads) as_thread(thread, __tsan_acquire, start.get());
#endif
}

void resume(Thread& thread) {
  emulator.current = &thread;
  threadIdx = thread.index;
#ifdef CUDA_ON_HOST_ADDRESS
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, thread.stack, kStack - kPage);
#endif
#ifdef CUDA_ON_HOST_THREAD
  __tsan_switch_to_fiber(thread.sanitizers, __tsan_switch_to_fiber_no_sync);
#endif
  emulator.scheduler.switch_to(thread.context);
#ifdef CUDA_ON_HOST_ADDRESS
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
#ifdef CUDA_ON_HOST_THREAD
  if (thread.state == State::kReturned) as_thread(thread, __tsan_release, launch_end.get());
#endif
}

std::vector<uint64_t> in_order(uint64_t count) {
  std::vector<uint64_t> numbers(count);
  for (uint64_t i = 0; i < count; ++i) numbers[i] = emulator.order == 1 ? count - 1 - i : i;
  if (emulator.order == 2) std::shuffle(numbers.begin(), numbers.end(), emulator.random);
  return numbers;
}

// Writes what each lane gets to where it says, out of what all have brought.
using Combination = void (*)(void* const* lanes);

template <bool TRANSPOSED>
void exchange_matrices(void* const* lanes) {
  const auto element = [&](unsigned matrix, unsigned row, unsigned column) {
    return uint32_t(static_cast<MatrixRow*>(lanes[8 * matrix + row])->elements[column]);
  };
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    uint32_t* const out = static_cast<MatrixRow*>(lanes[lane])->out;
    const unsigned i = lane / 4, j = lane % 4 * 2;
    for (unsigned matrix = 0; matrix < 4; ++matrix)
      out[matrix] = TRANSPOSED ? element(matrix, j, i) | element(matrix, j + 1, i) << 16
                               : element(matrix, i, j) | element(matrix, i, j + 1) << 16;
  }
}

double to_double(uint32_t bits, __nv_bfloat16) { return __bfloat162float({uint16_t(bits)}); }
double to_double(uint32_t bits, __half) { return __half2float({uint16_t(bits)}); }

// Tensor cores read the upper 19 bits.
double to_double(uint32_t bits, float) {
  bits &= 0xffffe000;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// In double, where products are exact; rounded once.
template <class T>
void multiply(void* const* lanes) {
  constexpr unsigned kEach = 4 / sizeof(T), kDepth = 8 * kEach;
  double a[16][kDepth], b[kDepth][8];
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    const Product& own = *static_cast<Product*>(lanes[lane]);
    const unsigned i = lane / 4, j = lane % 4 * kEach;
    for (unsigned e = 0; e < kEach; ++e) {
      for (unsigned r = 0; r < 4; ++r)
        a[i + r % 2 * 8][j + r / 2 * 4 * kEach + e] = to_double(own.a[r] >> 16 * e, T{});
      for (unsigned r = 0; r < 2; ++r)
        b[j + r * 4 * kEach + e][i] = to_double(own.b[r] >> 16 * e, T{});
    }
  }
  double sums[16][8] = {};
  for (unsigned m = 0; m < 16; ++m)
    for (unsigned k = 0; k < kDepth; ++k)
      for (unsigned n = 0; n < 8; ++n) sums[m][n] += a[m][k] * b[k][n];
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    float* const own = static_cast<Product*>(lanes[lane])->sums;
    for (unsigned r = 0; r < 4; ++r)
      own[r] = float(sums[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2] + own[r]);
  }
}

// Null of a call by some lanes.
Combination combination(WarpCall call) {
  switch (call) {
    case WarpCall::kLoadMatrices: return exchange_matrices<false>;
    case WarpCall::kLoadTransposedMatrices: return exchange_matrices<true>;
    case WarpCall::kMultiplyBfloat16: return multiply<__nv_bfloat16>;
    case WarpCall::kMultiplyHalf: return multiply<__half>;
    case WarpCall::kMultiplyTf32: return multiply<float>;
    default: return nullptr;
  }
}

class Warp {
 public:
  explicit Warp(size_t number)
      : threads_(&emulator.threads[number * kWarp]),
        size_(std::min<size_t>(kWarp, emulator.threads.size() - number * kWarp)) {}

  // Runs each lane that can until it waits or returns; false where none could.
  bool step() {
    bool stepped = false;
    for (uint64_t lane : in_order(size_)) {
      if (threads_[lane].state != State::kReady) continue;
      resume(threads_[lane]);
      stepped = true;
      if (threads_[lane].state == State::kRefused) refuse(threads_[lane], threads_[lane].why);
      if (threads_[lane].state == State::kAtWarpCall) check_call(lane);
    }
    for (unsigned lane = 0; lane < size_; ++lane) {
      const Thread& thread = threads_[lane];
      if (thread.state != State::kAtWarpCall || !all_called(thread)) continue;
      if (const Combination combine = combination(thread.call))
        answer_together(combine);
      else
        answer(thread.mask);
    }
    return stepped;
  }

  // Says why a lane waits at a warp call for ever.
  void explain() const {
    for (unsigned lane = 0; lane < size_; ++lane) {
      const Thread& thread = threads_[lane];
      if (thread.state != State::kAtWarpCall) continue;
      for (unsigned other = 0; other < kWarp; ++other) {
        if (!(thread.mask >> other & 1) || (other < size_ && meets(thread, threads_[other])))
          continue;
        refuse(thread, "has the mask " + hexadecimal(thread.mask) + " with lane " +
                           std::to_string(other) + ", " + whereabouts(other));
      }
    }
  }

 private:
  static bool meets(const Thread& a, const Thread& b) {
    return b.state == State::kAtWarpCall && b.call == a.call && b.mask == a.mask &&
           same(a.site, b.site);
  }

  bool all_called(const Thread& thread) const {
    for (unsigned lane = 0; lane < kWarp; ++lane)
      if (thread.mask >> lane & 1 && (lane >= size_ || !meets(thread, threads_[lane])))
        return false;
    return true;
  }

  void check_call(unsigned lane) const {
    const Thread& thread = threads_[lane];
    if (!(thread.mask >> lane & 1))
      refuse(thread, "is called by lane " + std::to_string(lane) + ", which its mask " +
                         hexadecimal(thread.mask) + " leaves out");
    const int width = thread.width;
    if (width < 1 || width > int(kWarp) || (width & (width - 1)))
      refuse(thread, "has the width " + std::to_string(width) +
                         ", which is no power of two from 1 to 32");
  }

  // The lane that a shuffle reads, as PTX has it for `shfl.sync`.
  static unsigned source(const Thread& thread, unsigned lane) {
    const unsigned segment = kWarp - thread.width, operand = unsigned(thread.operand) % kWarp;
    const unsigned first = lane & segment, last = first | (thread.width - 1);
    switch (thread.call) {
      case WarpCall::kShuffleUp: return lane < first + operand ? lane : lane - operand;
      case WarpCall::kShuffleDown: return lane + operand > last ? lane : lane + operand;
      case WarpCall::kShuffleXor: return (lane ^ operand) > last ? lane : lane ^ operand;
      default: return first | (operand & ~segment);
    }
  }

  void answer(unsigned mask) {
    std::vector<Thread*> group;
    uint64_t ballot = 0;
    for (unsigned lane = 0; lane < size_; ++lane) {
      if (!(mask >> lane & 1)) continue;
      group.push_back(&threads_[lane]);
      ballot |= threads_[lane].value << lane;
    }
    for (Thread* thread : group) {
      if (thread->call == WarpCall::kBallot) {
        thread->result = ballot;
      } else if (thread->call != WarpCall::kSync) {
        const unsigned from = source(*thread, unsigned(thread - threads_));
        if (!(mask >> from & 1))
          refuse(*thread, "reads lane " + std::to_string(from) + ", which its mask " +
                              hexadecimal(mask) + " leaves out");
        thread->result = threads_[from].value;
      }
    }
    for (Thread* thread : group) thread->state = State::kReady;
    order_by_meeting(group);
  }

  void answer_together(Combination combine) {
    void* lanes[kWarp];
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      lanes[lane] = reinterpret_cast<void*>(threads_[lane].value);
      threads_[lane].state = State::kReady;
    }
    combine(lanes);
  }

  std::string whereabouts(unsigned lane) const {
    if (lane >= size_) return "which the block has not";
    const Thread& thread = threads_[lane];
    if (thread.state == State::kReturned) return "which has returned";
    if (thread.state == State::kAtBarrier) return "which waits at " + text(thread.site);
    return "which is at the " + std::string(name(thread.call)) + " of " + text(thread.site) +
           " with the mask " + hexadecimal(thread.mask);
  }

  Thread* threads_;
  size_t size_;
};

bool all_at_one_barrier() {
  const Site site = emulator.threads[0].site;
  return std::all_of(emulator.threads.begin(), emulator.threads.end(), [&](const Thread& thread) {
    return thread.state == State::kAtBarrier && same(thread.site, site);
  });
}

[[noreturn]] void explain_barrier() {
  const auto& threads = emulator.threads;
  const auto waits = [](const Thread& thread) { return thread.state == State::kAtBarrier; };
  const Thread& waiting = *std::find_if(threads.begin(), threads.end(), waits);
  for (const Thread& other : threads) {
    const std::string who = "waits for thread " + text(other.index);
    if (!waits(other)) refuse(waiting, who + ", which has returned");
    if (!same(other.site, waiting.site)) refuse(waiting, who + ", which is at " + text(other.site));
  }
  throw std::logic_error("the threads of a block wait for nothing");
}

void run_block(size_t shared) {
  make_shared(shared);
  start_threads();

  std::vector<Warp> warps;
  for (size_t first = 0; first < emulator.threads.size(); first += kWarp)
    warps.emplace_back(first / kWarp);
  while (true) {
    bool stepped = false;
    for (uint64_t number : in_order(warps.size())) {
      // As far ahead of the others as it gets; in random order, a bit at a time.
      while (warps[number].step()) {
        stepped = true;
        if (emulator.order == 2) break;
      }
    }
    if (stepped) continue;
    if (std::all_of(emulator.threads.begin(), emulator.threads.end(),
                    [](const Thread& thread) { return thread.state == State::kReturned; }))
      return;
    if (!all_at_one_barrier()) {
      for (const Warp& warp : warps) warp.explain();
      explain_barrier();
    }
    std::vector<Thread*> all;
    for (Thread& thread : emulator.threads) {
      thread.state = State::kReady;
      all.push_back(&thread);
    }
    order_by_meeting(all);
  }
}

// What the runtime refuses before it launches.
cudaError_t check(const cudaLaunchConfig_t& config) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (!block.x || !block.y || !block.z || block.x > kMaxThreads || block.y > kMaxThreads ||
      block.z > 64 || size_t(block.x) * block.y * block.z > kMaxThreads)
    return cudaErrorInvalidConfiguration;
  // More would take cudaFuncSetAttribute.
  return config.dynamicSmemBytes > kShared ? cudaErrorInvalidValue : cudaSuccess;
}

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) emulator.last_error = error;
  return error;
}

// Ends the launch: what is thrown on a fiber goes nowhere.
void give_up(const char* name, const char* why, Site site) {
  Thread& thread = *emulator.current;
  thread.state = State::kRefused;
  thread.name = name;
  thread.why = why;
  thread.site = site;
  leave_fiber();
}

bool aligned(const void* at, size_t bytes) { return reinterpret_cast<uintptr_t>(at) % bytes == 0; }

bool in_shared(const void* at, size_t bytes) {
  const uintptr_t offset = uintptr_t(at) - uintptr_t(cuda_on_host_arena + kMargin);
  return offset <= emulator.shared && emulator.shared - offset >= bytes;
}

}  // namespace

void wait_for_block(Site site) {
  emulator.current->state = State::kAtBarrier;
  emulator.current->site = site;
  leave_fiber();
}

uint64_t wait_for_warp(WarpCall call, unsigned mask, uint64_t value, int operand, int width,
                       Site site) {
  Thread& thread = *emulator.current;
  thread.state = State::kAtWarpCall;
  thread.site = site;
  thread.call = call;
  thread.mask = mask;
  thread.value = value;
  thread.operand = operand;
  thread.width = width;
  leave_fiber();
  return thread.result;
}

bool begin_copy(const Copy& copy, Site site) {
  if (!in_shared(copy.to, copy.bytes))
    give_up("copy_async", "writes outside of shared memory", site);
  if (!aligned(copy.to, copy.bytes))
    give_up("copy_async", "writes where it is not aligned to its size", site);
  if (copy.real && !aligned(copy.from, copy.bytes))
    give_up("copy_async", "reads where it is not aligned to its size", site);
  if (emulator.order == 1 || (emulator.order == 2 && emulator.random() % 2)) return true;
  const AsScheduler as_scheduler;
  emulator.current->copies.push_back({copy, emulator.current->groups});
  return false;
}

void commit_copies() { ++emulator.current->groups; }

bool end_copy(uint64_t pending, Copy* copy) {
  Thread& thread = *emulator.current;
  auto& copies = thread.copies;
  if (copies.empty() || copies[0].group + pending >= thread.groups) return false;
  // The last of the first group: groups end in order, what is in them does not.
  const auto end = std::find_if(copies.begin(), copies.end(), [&](const CopyOfGroup& other) {
    return other.group != copies[0].group;
  });
  *copy = (end - 1)->copy;
  const AsScheduler as_scheduler;
  copies.erase(end - 1);
  return true;
}

void check_matrix_row(const void* row, Site site) {
  if (!in_shared(row, 16)) give_up("load_matrices", "reads outside of shared memory", site);
  if (!aligned(row, 16))
    give_up("load_matrices", "reads where it is not aligned to 16 bytes", site);
}

cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  if (check(config) != cudaSuccess) return remember(check(config));
  const std::lock_guard<std::mutex> alone(emulator.busy);
  const dim3 grid = config.gridDim, block = config.blockDim;
  const size_t shared = config.dynamicSmemBytes;
  emulator.launches.push_back(
      {{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared});
  make_stacks();
  emulator.thread = &thread;
  emulator.shared = shared;
  emulator.threads.assign(size_t(block.x) * block.y * block.z, Thread{});
  gridDim = grid;
  blockDim = block;
  struct Running {
    explicit Running(size_t shared) { begin_launch(shared); }
    ~Running() { end_launch(); }
  } running(shared);
  for (uint64_t number : in_order(uint64_t(grid.x) * grid.y * grid.z)) {
    const uint64_t row = number / grid.x;
    blockIdx = {unsigned(number % grid.x), unsigned(row % grid.y), unsigned(row / grid.y)};
    run_block(shared);
  }
  return cudaSuccess;
}

}  // namespace cuda_on_host

using namespace cuda_on_host;

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
  }
  return "unrecognized error code";
}

cudaError_t cudaPeekAtLastError() { return emulator.last_error; }

cudaError_t cudaGetLastError() { return std::exchange(emulator.last_error, cudaSuccess); }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  return remember(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return remember(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = kMaxThreads; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = kShared; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = kSharedOptin; break;
    case cudaDevAttrWarpSize: *value = kWarp; break;
    case cudaDevAttrMultiProcessorCount: *value = 4; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 8; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    default: return remember(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

// 0 ascending, 1 descending, 2 random: of blocks, of a block's warps, of a warp's lanes.
VISIBLE void cuda_on_host_order(int order, unsigned seed) {
  emulator.order = order;
  emulator.random.seed(seed);
}

// Copies out at most `most` launches, the oldest first, and says how many there were.
VISIBLE uint64_t cuda_on_host_launches(Launch* launches, uint64_t most) {
  const uint64_t count = emulator.launches.size();
  std::copy_n(emulator.launches.begin(), std::min(count, most), launches);
  return count;
}

VISIBLE void cuda_on_host_forget_launches() { emulator.launches.clear(); }
