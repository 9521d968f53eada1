// Runs a kernel launch on the host: block after block, one fiber per CUDA thread. A fiber runs until it reaches a
// barrier (shuffles and votes are barriers of their warp) and then gives way to another that can run. Which one is the
// schedule, set by CUDA_EMULATION_SCHEDULE: `forward` prefers the lowest warp and lane and runs blocks in order,
// `backward` the highest and in reverse, `random` (or `random:SEED`) any. A kernel whose answer depends on the schedule
// lacks a barrier.
#include <cuda_runtime.h>
#include <link.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulation {
namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr size_t kStackBytes = 128 << 10;
// What a kernel may use without asking for more by an attribute of the function.
constexpr size_t kMaxSharedBytes = 48 << 10;
// A NaN in every floating-point type, and an index that no array has.
constexpr int kPoison = 0xff;

struct Context {
  ucontext_t start;
  void* jump[5];
  void* fake_stack = nullptr;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
};

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kExited };

struct Thread {
  Context context;
  bool entered = false;
  State state;
  Where where;
  unsigned mask;
  uint64_t bits;
  Lanes received;
};

// GCC's own setjmp, since that of the C library is known to ASan, which would clear the shadow of the wrong stack. The
// two halves must not share a function.
#define NOT_SANITIZED __attribute__((noinline, no_sanitize("address", "undefined")))

[[noreturn]] NOT_SANITIZED void leave(Context& to, bool entered) {
  if (entered) __builtin_longjmp(to.jump, 1);
  setcontext(&to.start);
  std::abort();
}

NOT_SANITIZED void jump(Context& from, Context& to, bool entered) {
  if (__builtin_setjmp(from.jump) == 0) leave(to, entered);
}

// Static shared memory: the thread-local data of the module that this file is linked into.
struct StaticShared {
  void* data = nullptr;
  size_t bytes = 0;
};

int find_static_shared(dl_phdr_info* module, size_t, void* result) {
  const auto own_address = reinterpret_cast<uintptr_t>(&find_static_shared);
  bool own = false;
  size_t bytes = 0;
  for (int i = 0; i < module->dlpi_phnum; ++i) {
    const auto& segment = module->dlpi_phdr[i];
    if (segment.p_type == PT_LOAD && own_address - (module->dlpi_addr + segment.p_vaddr) < segment.p_memsz) own = true;
    if (segment.p_type == PT_TLS) bytes = segment.p_memsz;
  }
  if (!own) return 0;
  *static_cast<StaticShared*>(result) = {module->dlpi_tls_data, bytes};
  return 1;
}

class Schedule {
 public:
  explicit Schedule(const std::string& name) : random_(name.starts_with("random")), backward_(name == "backward") {
    if (random_ && name.size() > 7) generator_.seed(std::stoul(name.substr(7)));
    if (!random_ && !backward_ && name != "forward")
      throw std::runtime_error("CUDA_EMULATION_SCHEDULE must be forward, backward, random or random:SEED; got " + name);
  }

  // The index of one of the set bits.
  unsigned pick(uint32_t bits) {
    if (backward_) return 31 - std::countl_zero(bits);
    for (unsigned skip = random_ ? generator_() % std::popcount(bits) : 0; skip > 0; --skip) bits &= bits - 1;
    return std::countr_zero(bits);
  }

  // At random one mostly goes on with the same warp, so that it comes far ahead of another: past the barrier that both
  // must wait at, to what the next one writes.
  unsigned pick_warp(uint32_t ready) {
    if (random_ && (ready >> warp_ & 1) && generator_() % 256 != 0) return warp_;
    return warp_ = pick(ready);
  }

  std::vector<uint64_t> block_order(uint64_t blocks) {
    std::vector<uint64_t> order(blocks);
    std::iota(order.begin(), order.end(), 0);
    if (backward_) std::reverse(order.begin(), order.end());
    if (random_) std::shuffle(order.begin(), order.end(), generator_);
    return order;
  }

 private:
  bool random_, backward_;
  unsigned warp_ = 0;
  std::mt19937 generator_;
};

class Machine {
 public:
  cudaError_t run(const cudaLaunchConfig_t& config, void (*thread)(void*), void* context);

  Thread& current() { return threads_[current_]; }
  unsigned lane() const { return current_ % warpSize; }
  void* shared() { return shared_.get(); }
  void at_block_barrier(Where where);
  const Lanes& at_warp_barrier(unsigned mask, uint64_t bits, Where where);

  std::string error;

 private:
  static void fiber();
  void run_block();
  void resume(unsigned thread);
  void give_way();
  void make_ready(unsigned thread);
  void forget_fibers();
  std::string stuck() const;

  Schedule schedule_{std::getenv("CUDA_EMULATION_SCHEDULE") ?: "forward"};
  std::unique_ptr<Thread[]> threads_{new Thread[kMaxThreads]};
  std::byte* stacks_ = nullptr;
  StaticShared static_shared_;
  std::unique_ptr<std::byte[]> shared_;
  size_t shared_bytes_ = 0;
  Context scheduler_;
  void (*kernel_)(void*) = nullptr;
  void* arguments_ = nullptr;
  unsigned count_ = 0, current_ = 0, arrived_ = 0;
  uint32_t ready_lanes_[kMaxThreads / warpSize] = {};
  uint32_t ready_warps_ = 0;
  uint32_t waiting_lanes_[kMaxThreads / warpSize] = {};
};

// Never destroyed: the fibers' stacks are in use until the process ends.
Machine& machine() {
  static Machine& machine = *new Machine;
  return machine;
}

bool same(Where a, Where b) {
  return a.line() == b.line() && (a.file_name() == b.file_name() || std::string(a.file_name()) == b.file_name());
}

std::string at(Where where) { return std::string(where.file_name()) + ":" + std::to_string(where.line()); }

std::string name(unsigned thread) {
  return "thread " + std::to_string(thread) + " of block " + std::to_string(blockIdx.x) + "," +
         std::to_string(blockIdx.y) + "," + std::to_string(blockIdx.z);
}

void Machine::fiber() {
  Machine& self = machine();
  __sanitizer_finish_switch_fiber(nullptr, &self.scheduler_.stack, &self.scheduler_.stack_bytes);
  for (;;) {
    try {
      self.kernel_(self.arguments_);
    } catch (const std::exception& exception) {
      self.error = exception.what();
    }
    self.current().state = State::kExited;
    self.give_way();
  }
}

void Machine::give_way() {
  Context& own = current().context;
  __sanitizer_start_switch_fiber(&own.fake_stack, scheduler_.stack, scheduler_.stack_bytes);
  jump(own, scheduler_, true);
  // Another launch may come from another operating-system thread.
  __sanitizer_finish_switch_fiber(own.fake_stack, &scheduler_.stack, &scheduler_.stack_bytes);
}

void Machine::resume(unsigned index) {
  Thread& thread = threads_[index];
  current_ = index;
  threadIdx = {index % blockDim.x, index / blockDim.x % blockDim.y, index / (blockDim.x * blockDim.y)};
  __sanitizer_start_switch_fiber(&scheduler_.fake_stack, thread.context.stack, thread.context.stack_bytes);
  jump(scheduler_, thread.context, std::exchange(thread.entered, true));
  __sanitizer_finish_switch_fiber(scheduler_.fake_stack, nullptr, nullptr);
}

void Machine::make_ready(unsigned thread) {
  threads_[thread].state = State::kReady;
  ready_lanes_[thread / warpSize] |= 1u << thread % warpSize;
  ready_warps_ |= 1u << thread / warpSize;
}

void Machine::at_block_barrier(Where where) {
  Thread& own = current();
  own.state = State::kAtBlockBarrier;
  own.where = where;
  if (++arrived_ == count_) {
    arrived_ = 0;
    for (unsigned i = 0; i < count_; ++i) {
      if (!same(threads_[i].where, where))
        fail(("divergent barriers: " + name(i) + " is at " + at(threads_[i].where)).c_str(), where);
      make_ready(i);
    }
  }
  give_way();
}

const Lanes& Machine::at_warp_barrier(unsigned mask, uint64_t bits, Where where) {
  const unsigned warp = current_ / warpSize;
  Thread* const lanes = &threads_[warp * warpSize];
  const unsigned existing = std::min<unsigned>(warpSize, count_ - warp * warpSize);
  if (existing < warpSize) mask &= (1u << existing) - 1;
  if (!(mask >> lane() & 1)) fail((name(current_) + " is not in the mask that it names").c_str(), where);
  Thread& own = current();
  own.state = State::kAtWarpBarrier;
  own.where = where;
  own.mask = mask;
  own.bits = bits;
  waiting_lanes_[warp] |= 1u << lane();

  bool complete = (waiting_lanes_[warp] & mask) == mask;
  for (uint32_t rest = complete ? mask : 0; rest; rest &= rest - 1) {
    const Thread& other = lanes[std::countr_zero(rest)];
    // Lanes that name another mask wait for another exchange.
    if (other.mask != mask)
      complete = false;
    else if (!same(other.where, where))
      fail(("divergent warp: a lane is at " + at(other.where)).c_str(), where);
  }
  if (complete) {
    waiting_lanes_[warp] &= ~mask;
    Lanes all{mask, {}};
    for (unsigned i = 0; i < existing; ++i) all.bits[i] = lanes[i].bits;
    for (uint32_t rest = mask; rest; rest &= rest - 1) {
      lanes[std::countr_zero(rest)].received = all;
      make_ready(warp * warpSize + std::countr_zero(rest));
    }
  }
  give_way();
  return own.received;
}

std::string Machine::stuck() const {
  std::string message = "divergent barriers:";
  // The first of each kind tells the story; a thousand lines would hide it.
  for (State state : {State::kAtBlockBarrier, State::kAtWarpBarrier, State::kExited}) {
    for (unsigned i = 0; i < count_; ++i) {
      if (threads_[i].state != state) continue;
      message +=
          " " + name(i) + (state == State::kExited ? " has exited;" : " waits at " + at(threads_[i].where) + ";");
      break;
    }
  }
  return message;
}

// After an error, the frames of the threads that have not ended are abandoned where they are.
void Machine::forget_fibers() {
  for (unsigned i = 0; i < kMaxThreads; ++i) {
    Thread& thread = threads_[i];
    thread.entered = false;
    thread.context.stack = stacks_ + i * kStackBytes;
    thread.context.stack_bytes = kStackBytes;
    __asan_unpoison_memory_region(thread.context.stack, kStackBytes);
    getcontext(&thread.context.start);
    thread.context.start.uc_stack.ss_sp = stacks_ + i * kStackBytes;
    thread.context.start.uc_stack.ss_size = kStackBytes;
    thread.context.start.uc_link = nullptr;
    makecontext(&thread.context.start, fiber, 0);
  }
}

void Machine::run_block() {
  std::memset(static_shared_.data, kPoison, static_shared_.bytes);
  if (shared_bytes_) std::memset(shared_.get(), kPoison, shared_bytes_);
  arrived_ = 0;
  ready_warps_ = 0;
  for (uint32_t& lanes : ready_lanes_) lanes = 0;
  for (uint32_t& lanes : waiting_lanes_) lanes = 0;
  for (unsigned i = 0; i < count_; ++i) make_ready(i);
  while (ready_warps_) {
    const unsigned warp = schedule_.pick_warp(ready_warps_), lane = schedule_.pick(ready_lanes_[warp]);
    ready_lanes_[warp] &= ~(1u << lane);
    if (!ready_lanes_[warp]) ready_warps_ &= ~(1u << warp);
    resume(warp * warpSize + lane);
    if (!error.empty()) return;
  }
  for (unsigned i = 0; i < count_; ++i)
    if (threads_[i].state != State::kExited) error = stuck();
}

cudaError_t Machine::run(const cudaLaunchConfig_t& config, void (*kernel)(void*), void* arguments) {
  const uint64_t threads = uint64_t{config.blockDim.x} * config.blockDim.y * config.blockDim.z;
  const uint64_t blocks = uint64_t{config.gridDim.x} * config.gridDim.y * config.gridDim.z;
  if (threads == 0 || threads > kMaxThreads || config.blockDim.z > 64 || blocks == 0 || config.gridDim.x > INT32_MAX ||
      config.gridDim.y > 65535 || config.gridDim.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes > kMaxSharedBytes) return cudaErrorInvalidValue;

  if (!stacks_) {
    void* memory = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stacks_ = static_cast<std::byte*>(memory);
    forget_fibers();
  }
  kernel_ = kernel;
  arguments_ = arguments;
  count_ = threads;
  blockDim = config.blockDim;
  gridDim = config.gridDim;
  shared_bytes_ = config.dynamicSmemBytes;
  // It has exactly this size, so that ASan sees an access beyond it.
  shared_.reset(shared_bytes_ ? new std::byte[shared_bytes_] : nullptr);
  // Thread-local data of a shared library exists from its first use on.
  static thread_local volatile char first_use;
  (void)first_use;
  dl_iterate_phdr(find_static_shared, &static_shared_);
  error.clear();
  for (const uint64_t block : schedule_.block_order(blocks)) {
    blockIdx = {static_cast<unsigned>(block % gridDim.x), static_cast<unsigned>(block / gridDim.x % gridDim.y),
                static_cast<unsigned>(block / gridDim.x / gridDim.y)};
    run_block();
    if (!error.empty()) {
      forget_fibers();
      return cudaErrorLaunchFailure;
    }
  }
  return cudaSuccess;
}

}  // namespace

int64_t launches = 0;

cudaError_t launch(const cudaLaunchConfig_t& config, void (*thread)(void*), void* context) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  ++launches;
  return machine().run(config, thread, context);
}

void block_barrier(Where where) { machine().at_block_barrier(where); }
const Lanes& warp_exchange(unsigned mask, uint64_t bits, Where where) {
  return machine().at_warp_barrier(mask, bits, where);
}
unsigned lane_id() { return machine().lane(); }
void fail(const char* what, Where where) { throw std::runtime_error(std::string(what) + ", " + at(where)); }
void* dynamic_shared_memory() { return machine().shared(); }

}  // namespace emulation

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorLaunchFailure:
      return emulation::machine().error.c_str();
    default:
      return "invalid argument";
  }
}

// How many kernels have been launched in this process, for tests/test_launches.py.
extern "C" __attribute__((visibility("default"))) int64_t cuda_emulation_launches() { return emulation::launches; }
