// The one header through which kernels speak. nvcc compiles the same source for a GPU, and g++ (with GPU_SIM) for the simulator
// in cuda/sim, which runs every kernel on the host. Kernels use CUDA's built-ins, __syncthreads() or __shfl_sync() say, as they
// are; what is no function in both worlds has its one spelling here, and nothing outside this header and cuda/sim says
// <<<>>>, __shared__, asm or __CUDA_ARCH__. test/boundary/cuda.test.ts keeps that.
#pragma once

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <type_traits>

#ifdef GPU_SIM
#include "sim/device.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace gpu {

// GPU_SHARED(partial_sums, float[8]) declares a shared variable of the block, not initialized.
// GPU_DYNAMIC_SHARED(Tile, tile) declares `Tile* const tile`, the bytes that launch() was asked for, aligned to 128.
template <class T>
using Same = T;
#ifdef GPU_SIM
#define GPU_SHARED(name, ...) \
  ::gpu::Same<__VA_ARGS__>& name = ::gpu::shared_variable<__VA_ARGS__>([] {}, ::sim::Location::current())
#define GPU_DYNAMIC_SHARED(type, name) \
  auto* const name = static_cast<::gpu::Same<type>*>(::sim::dynamic_shared(::sim::Location::current()))
template <class T, class PerDeclaration>
T& shared_variable(PerDeclaration, sim::Location where) {
  static char const key = 0;
  return *static_cast<T*>(sim::static_shared(&key, sizeof(T), alignof(T), where));
}
#else
#define GPU_SHARED(name, ...) __shared__ ::gpu::Same<__VA_ARGS__> name
#define GPU_DYNAMIC_SHARED(type, name)                                 \
  extern __shared__ __align__(128) unsigned char gpu_dynamic_shared[]; \
  auto* const name = reinterpret_cast<::gpu::Same<type>*>(gpu_dynamic_shared)
#endif

inline constexpr size_t default_shared_bytes = 48 << 10;  // more has to be asked for, kernel by kernel; launch() does
inline constexpr size_t most_argument_bytes = 4096;

// Whether this compilation of a kernel is for GPUs with 227 KB of shared memory a block: 9.x to 11.x; 8.x and 12.x have 99 to 163. A
// kernel that needs them has no body elsewhere, and launchers ask has_large_shared_body() before they choose it.
#if defined(GPU_SIM) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200)
inline constexpr bool large_shared = true;
#else
inline constexpr bool large_shared = false;
#endif
template <class... Parameters>
bool has_large_shared_body([[maybe_unused]] void (*kernel)(Parameters...)) {
#ifdef GPU_SIM
  return true;
#else
  cudaFuncAttributes attributes{};
  if (cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess)
    return attributes.ptxVersion >= 90 && attributes.ptxVersion < 120;
  cudaGetLastError();
  return false;
#endif
}

// Whether warps of this compilation may hand registers to each other: code for one architecture alone, as nvcc calls it (90a, 100a).
// For the others a kernel that needs it has no body: next to no registers, and has_body() tells launchers so.
#if defined(GPU_SIM) || defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(__CUDA_ARCH_FEAT_SM100_ALL)
inline constexpr bool moves_registers = true;
#else
inline constexpr bool moves_registers = false;
#endif
template <class... Parameters>
bool has_body([[maybe_unused]] void (*kernel)(Parameters...)) {
#ifdef GPU_SIM
  return true;
#else
  constexpr int empty_registers = 32;
  cudaFuncAttributes attributes{};
  if (cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess) return attributes.numRegs > empty_registers;
  cudaGetLastError();
  return false;
#endif
}

template <class... Parameters, class... Arguments>
cudaError_t enqueue(bool early, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                    cudaStream_t stream, Arguments&&... arguments) {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...), "kernels take plain values and structs");
  static_assert((sizeof(Parameters) + ... + 0) <= most_argument_bytes);
#ifdef GPU_SIM
  static_cast<void>(early);
  return sim::enqueue(kernel, grid, block, shared_bytes, stream,
                      static_cast<Parameters>(static_cast<Arguments&&>(arguments))...);
#else
  if (shared_bytes > default_shared_bytes) {
    cudaError_t const refused =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (refused != cudaSuccess) return refused;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t configuration{};
  configuration.gridDim = grid;
  configuration.blockDim = block;
  configuration.dynamicSmemBytes = shared_bytes;
  configuration.stream = stream;
  configuration.attrs = &attribute;
  configuration.numAttrs = early ? 1 : 0;
  return cudaLaunchKernelEx(&configuration, kernel, static_cast<Arguments&&>(arguments)...);
#endif
}

// Enqueues `kernel` on `stream`. Allocates nothing and waits for nothing, so that it can be captured in a graph.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Arguments&&... arguments) {
  return enqueue(false, kernel, grid, block, shared_bytes, stream, static_cast<Arguments&&>(arguments)...);
}

// Likewise; but from compute capability 9.0 on its blocks may start while the kernel before it on the stream is still running, once
// all blocks of that one have called let_next_start() or ended. Each block calls wait_for_last() before it reads what kernels before it
// wrote, before it writes what they read, and before it ends.
template <class... Parameters, class... Arguments>
cudaError_t launch_early(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                         Arguments&&... arguments) {
  bool early = false;
#ifndef GPU_SIM
  int device = 0;
  int major = 0;
  if (cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess)
    early = major >= 9;
#endif
  return enqueue(early, kernel, grid, block, shared_bytes, stream, static_cast<Arguments&&>(arguments)...);
}

__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_last() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#ifdef GPU_SIM
#define GPU_WHERE , ::sim::Location where = ::sim::Location::current()
#define GPU_WHERE_ONLY ::sim::Location where = ::sim::Location::current()
#else
#define GPU_WHERE
#define GPU_WHERE_ONLY
#endif

// ---- warp matrix instructions --------------------------------------------------------------------------------------------
// d += a b, with a 16 x 16, b 16 x 8, d 16 x 8. In lane l, with g = l / 4 and q = 2 (l % 4), low half of a register first:
//   a[r]: row g + 8 (r % 2), columns q + 8 (r / 2) and the next     b[r]: rows q + 8 r and the next, column g
//   d[r]: row g + 8 (r / 2), column q + r % 2
__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2] GPU_WHERE) {
#ifdef GPU_SIM
  sim::mma_m16n8k16(sim::Float16::half, d, a, b, where);
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2] GPU_WHERE) {
#ifdef GPU_SIM
  sim::mma_m16n8k16(sim::Float16::bfloat, d, a, b, where);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// d += a b, with a 16 x 8, b 8 x 8, d 16 x 8, a and b in tf32: floats of which the lowest 13 bits are not looked at. With g = l / 4
// and t = l % 4:
//   a[r]: row g + 8 (r % 2), column t + 4 (r / 2)     b[r]: row t + 4 r, column g     d as above
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2] GPU_WHERE) {
#ifdef GPU_SIM
  sim::mma_m16n8k8_tf32(d, a, b, where);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Loads Count (1, 2 or 4) matrices of 8 x 8 16-bit values from shared memory. Lane 8 m + i gives the address of row i of matrix
// m, 16-byte aligned; the other lanes' addresses are not used. registers[m]: row l / 4, columns 2 (l % 4) and the next, of
// matrix m, or of its transpose.
template <bool Transposed = false, int Count>
__device__ __forceinline__ void ldmatrix(uint32_t (&registers)[Count], const void* row GPU_WHERE) {
  static_assert(Count == 1 || Count == 2 || Count == 4);
#ifdef GPU_SIM
  if (sim::lane() < 8 * Count && (reinterpret_cast<uintptr_t>(row) % 16 != 0 || !sim::is_shared(row, 16)))
    sim::fail(where, "ldmatrix: the row at %p is not 16 aligned bytes of shared memory", row);
  const void* rows[32];
  sim::gather_addresses(row, rows, where);
  int const major = sim::lane() / 4;
  int const minor = sim::lane() % 4 * 2;
  for (int matrix = 0; matrix < Count; ++matrix) {
    auto const at = [&](int y, int x) { return uint32_t{static_cast<const uint16_t*>(rows[matrix * 8 + y])[x]}; };
    registers[matrix] =
        Transposed ? at(minor, major) | at(minor + 1, major) << 16 : at(major, minor) | at(major, minor + 1) << 16;
  }
#else
  auto const address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (Count == 1 && !Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(registers[0]) : "r"(address) : "memory");
  if constexpr (Count == 1 && Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(registers[0])
                 : "r"(address)
                 : "memory");
  if constexpr (Count == 2 && !Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(registers[0]), "=r"(registers[1])
                 : "r"(address)
                 : "memory");
  if constexpr (Count == 2 && Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(registers[0]), "=r"(registers[1])
                 : "r"(address)
                 : "memory");
  if constexpr (Count == 4 && !Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  if constexpr (Count == 4 && Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
#endif
}

// Transposes an 8 x 8 matrix of 16-bit values held as ldmatrix gives it.
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t rows GPU_WHERE) {
#ifdef GPU_SIM
  return sim::transpose_8x8(rows, where);
#else
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(rows));
  return transposed;
#endif
}

// ---- asynchronous copies ---------------------------------------------------------------------------------------------------
// Copies Bytes (4, 8 or 16; both sides aligned to it) from global to shared memory some time before the wait for its group.
// Of the source, `source_bytes` are read and the rest is written as zeros.
template <int Bytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global, int source_bytes = Bytes GPU_WHERE) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
#ifdef GPU_SIM
  if (reinterpret_cast<uintptr_t>(shared) % Bytes != 0 || !sim::is_shared(shared, Bytes))
    sim::fail(where, "cp.async: the target %p is not %d aligned bytes of shared memory", shared, Bytes);
  if (reinterpret_cast<uintptr_t>(global) % Bytes != 0)
    sim::fail(where, "cp.async: the source %p is not aligned to %d bytes", global, Bytes);
  if (source_bytes < 0 || source_bytes > Bytes)
    sim::fail(where, "cp.async: %d source bytes of %d", source_bytes, Bytes);
  sim::AsyncCopy const copy{shared, global, Bytes, static_cast<unsigned>(source_bytes), 0};
  if (sim::async_copy_lands_now(copy)) sim::land(copy);
#else
  auto const address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(source_bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(global), "n"(Bytes),
                 "r"(source_bytes)
                 : "memory");
#endif
}

// Closes the group of copies that this thread has issued since the last one.
__device__ __forceinline__ void cp_async_commit() {
#ifdef GPU_SIM
  sim::async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most GroupsLeft of this thread's groups are under way. Other threads see the copies after a barrier.
template <int GroupsLeft>
__device__ __forceinline__ void cp_async_wait() {
#ifdef GPU_SIM
  sim::AsyncCopy copy;
  while (sim::async_landing(GroupsLeft, copy)) sim::land(copy);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(GroupsLeft) : "memory");
#endif
}

// ---- barriers ----------------------------------------------------------------------------------------------------------------
// Barrier `id` (1 to 15; __syncthreads is 0) of `threads` threads of the block, a multiple of 32.
__device__ __forceinline__ void barrier_sync(int id, int threads GPU_WHERE) {
#ifdef GPU_SIM
  sim::barrier(id, static_cast<unsigned>(threads), where);
#else
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// Counts at the barrier without waiting: for warps that only tell others that something is ready.
__device__ __forceinline__ void barrier_arrive(int id, int threads GPU_WHERE) {
#ifdef GPU_SIM
  sim::barrier_arrive(id, static_cast<unsigned>(threads), where);
#else
  asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// A barrier in shared memory that counts phases. Phase 0, 1, 2 ... ends with the last of its arrivals; who waits names the phase by
// its parity, and must not be two phases late. Arriving does not wait, and publishes what the warp wrote before a __syncwarp().
struct PhaseBarrier {
  uint64_t state;
};

// By one thread, before a barrier of the block.
__device__ __forceinline__ void initialize(PhaseBarrier& barrier, uint32_t arrivals) {
#ifdef GPU_SIM
  sim::initialize_phases(&barrier.state, arrivals);
#else
  auto const address = static_cast<uint32_t>(__cvta_generic_to_shared(&barrier));
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address), "r"(arrivals) : "memory");
#endif
}

__device__ __forceinline__ void arrive(PhaseBarrier& barrier GPU_WHERE) {
#ifdef GPU_SIM
  sim::arrive_at_phase(&barrier.state, where);
#else
  auto const address = static_cast<uint32_t>(__cvta_generic_to_shared(&barrier));
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(address) : "memory");
#endif
}

__device__ __forceinline__ bool has_completed(PhaseBarrier& barrier, uint32_t parity) {
#ifdef GPU_SIM
  return sim::phase_has_completed(&barrier.state, parity);
#else
  auto const address = static_cast<uint32_t>(__cvta_generic_to_shared(&barrier));
  uint32_t completed;
  asm volatile(
      "{\n.reg .pred completed;\nmbarrier.test_wait.parity.shared.b64 completed, [%1], %2;\n"
      "selp.u32 %0, 1, 0, completed;\n}"
      : "=r"(completed)
      : "r"(address), "r"(parity)
      : "memory");
  return completed;
#endif
}

__device__ __forceinline__ void wait(PhaseBarrier& barrier, uint32_t parity GPU_WHERE) {
#ifdef GPU_SIM
  while (!sim::phase_has_completed(&barrier.state, parity)) sim::spin(where);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  while (!has_completed(barrier, parity)) {
  }
#else
  auto const address = static_cast<uint32_t>(__cvta_generic_to_shared(&barrier));
  uint32_t completed;
  do
    asm volatile(
        "{\n.reg .pred completed;\nmbarrier.try_wait.parity.shared.b64 completed, [%1], %2;\n"
        "selp.u32 %0, 1, 0, completed;\n}"
        : "=r"(completed)
        : "r"(address), "r"(parity)
        : "memory");
  while (!completed);
#endif
}

// ---- registers ---------------------------------------------------------------------------------------------------------------
// From here on the warps of a group of four (a multiple of 4 warps from the block's first) have Count registers a thread; those that
// take wait until others have released enough. Only where moves_registers.
template <int Count>
__device__ __forceinline__ void take_registers() {
  static_assert(Count % 8 == 0 && Count >= 24 && Count <= 256);
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(__CUDA_ARCH_FEAT_SM100_ALL)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
#endif
}
template <int Count>
__device__ __forceinline__ void release_registers() {
  static_assert(Count % 8 == 0 && Count >= 24 && Count <= 256);
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(__CUDA_ARCH_FEAT_SM100_ALL)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
#endif
}

// ---- memory order between blocks ---------------------------------------------------------------------------------------------
// There is no __threadfence here: the order belongs to the access that publishes, or that finds out. For "the last block
// merges": every thread writes its part, __syncthreads(), one thread calls fetch_add_acq_rel, __syncthreads().
__device__ __forceinline__ uint32_t fetch_add_acq_rel(uint32_t* address, uint32_t value) {
#ifdef GPU_SIM
  sim::interruption();
  return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
#else
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(address), "r"(value) : "memory");
  return old;
#endif
}

// In a loop that waits, with progress of the writer guaranteed: it runs already, or before this block.
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* address GPU_WHERE) {
#ifdef GPU_SIM
  sim::spin(where);
  return __atomic_load_n(address, __ATOMIC_ACQUIRE);
#else
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
#endif
}

__device__ __forceinline__ void store_release(uint32_t* address, uint32_t value) {
#ifdef GPU_SIM
  sim::interruption();
  __atomic_store_n(address, value, __ATOMIC_RELEASE);
#else
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
#endif
}

// ---- loads -------------------------------------------------------------------------------------------------------------------
// 16 bytes that are read once and that no thread of the launch writes: past L1, 128 bytes at a time into L2.
__device__ __forceinline__ uint4 load_once_16(const void* address GPU_WHERE) {
#ifdef GPU_SIM
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0)
    sim::fail(where, "load_once_16: %p is not aligned to 16 bytes", address);
  return *static_cast<const uint4*>(address);
#else
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
#endif
}

// Words (1, 2 or 4) of 32 bits at byte `at` + Offset of the dynamic shared memory of a kernel that has no static one. `at` is all that an
// instruction computes: where dynamic shared memory begins is in the instruction as well, behind what the system keeps for itself, which
// has_dynamic_shared_begin() compares with the device.
inline constexpr int dynamic_shared_begin = 1024;
template <int Words, int Offset>
__device__ __forceinline__ void load_dynamic_shared(uint32_t (&words)[Words], [[maybe_unused]] const void* dynamic,
                                                    uint32_t at GPU_WHERE) {
  static_assert(Words == 1 || Words == 2 || Words == 4);
#ifdef GPU_SIM
  const void* const from = static_cast<const unsigned char*>(dynamic) + at + Offset;
  if (reinterpret_cast<uintptr_t>(from) % sizeof words != 0 || !sim::is_shared(from, sizeof words))
    sim::fail(where, "load_dynamic_shared: %p is not %zu aligned bytes of shared memory", from, sizeof words);
  std::memcpy(words, from, sizeof words);
#else
  if constexpr (Words == 1)
    asm volatile("ld.shared.u32 %0, [%1+%2];" : "=r"(words[0]) : "r"(at), "n"(dynamic_shared_begin + Offset));
  if constexpr (Words == 2)
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2+%3];"
                 : "=r"(words[0]), "=r"(words[1])
                 : "r"(at), "n"(dynamic_shared_begin + Offset));
  if constexpr (Words == 4)
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4+%5];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(at), "n"(dynamic_shared_begin + Offset));
#endif
}
inline bool has_dynamic_shared_begin() {
#ifdef GPU_SIM
  return true;
#else
  int device = 0;
  int reserved = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device);
  return reserved == dynamic_shared_begin;
#endif
}

__device__ __forceinline__ void prefetch_l2([[maybe_unused]] const void* address) {
#ifndef GPU_SIM
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

// ---- arithmetic --------------------------------------------------------------------------------------------------------------
// 2^x; relative error 2^-22 on the GPU, subnormal results are 0.
__device__ __forceinline__ float ex2_approx(float x) {
#ifdef GPU_SIM
  float const power = exp2f(x);
  return power < 0x1p-126f ? 0.0f : power;
#else
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#endif
}

__device__ __forceinline__ float lg2_approx(float x) {
#ifdef GPU_SIM
  return log2f(x);
#else
  float logarithm;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(logarithm) : "f"(x));
  return logarithm;
#endif
}

// 1 / x; relative error 2^-23.
__device__ __forceinline__ float rcp_approx(float x) {
#ifdef GPU_SIM
  return 1 / x;
#else
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(x));
  return reciprocal;
#endif
}

// Absolute error 2^-11 or so: for softcap only where that does not matter.
__device__ __forceinline__ float tanh_approx(float x) {
#ifdef GPU_SIM
  return tanhf(x);
#else
  float tangent;
  asm("tanh.approx.f32 %0, %1;" : "=f"(tangent) : "f"(x));
  return tangent;
#endif
}

// Any function of three bits, bit by bit: Table is its value for a = 0xf0, b = 0xcc, c = 0xaa.
template <int Table>
__device__ __forceinline__ uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
#ifdef GPU_SIM
  uint32_t result = 0;
  for (int row = 0; row < 8; ++row)
    if (Table >> row & 1) result |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
  return result;
#else
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(result) : "r"(a), "r"(b), "r"(c), "n"(Table));
  return result;
#endif
}

// condition ? yes : no, never as a branch: one around shuffles makes them wait for lanes one by one.
__device__ __forceinline__ float select(bool condition, float yes, float no) {
#ifdef GPU_SIM
  return condition ? yes : no;
#else
  float result;
  asm("{ .reg .pred p; setp.ne.s32 p, %3, 0; selp.f32 %0, %1, %2, p; }"
      : "=f"(result)
      : "f"(yes), "f"(no), "r"(static_cast<int>(condition)));
  return result;
#endif
}

// Byte i of the result is the one that digit i of the selector names, of the low 4 (`low`) and high 4 (`high`): by its lowest 3 bits, or
// where its highest is set, 8 times the first bit of that byte.
__device__ __forceinline__ uint32_t prmt(uint32_t low, uint32_t high, uint32_t selector) {
#ifdef GPU_SIM
  uint64_t const bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int index = 0; index < 4; ++index) {
    uint32_t const digit = selector >> (4 * index) & 15;
    uint32_t const byte = static_cast<uint32_t>(bytes >> (8 * (digit & 7)) & 0xff);
    result |= (digit < 8 ? byte : (byte >> 7) * 0xff) << (8 * index);
  }
  return result;
#else
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
  return result;
#endif
}

// Two floats rounded to nearest into one register, `low` in its low half.
__device__ __forceinline__ uint32_t cvt_f16x2(float low, float high) {
#ifdef GPU_SIM
  return __half_as_ushort(__float2half_rn(low)) | static_cast<uint32_t>(__half_as_ushort(__float2half_rn(high))) << 16;
#else
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#endif
}

__device__ __forceinline__ uint32_t cvt_bf16x2(float low, float high) {
#ifdef GPU_SIM
  return __bfloat16_as_ushort(__float2bfloat16_rn(low)) |
         static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(high))) << 16;
#else
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#endif
}

// To tf32, to nearest, ties away from zero. A NaN stays one.
__device__ __forceinline__ uint32_t cvt_tf32(float value) {
#ifdef GPU_SIM
  uint32_t const bits = __float_as_uint(value);
  bool const finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? (bits + 0x1000u) & ~0x1fffu : bits & 0x007fffffu ? 0x7fffffffu : bits;
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
#endif
}

// The lane, read again at every call: what is computed from it takes no register over a loop, and 20 clocks in it.
__device__ __forceinline__ int fresh_lane_id() {
#ifdef GPU_SIM
  return sim::lane();
#else
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
#endif
}

// threadIdx.x, likewise.
__device__ __forceinline__ unsigned fresh_thread_id() {
#ifdef GPU_SIM
  return threadIdx.x;
#else
  unsigned thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#endif
}

// `value`, of which the compiler knows nothing: what follows from it is computed where it is needed, and not kept in registers from outside a
// loop, or from one branch to the next.
__device__ __forceinline__ int unknown(int value) {
#ifndef GPU_SIM
  asm volatile("" : "+r"(value));
#endif
  return value;
}

__device__ __forceinline__ int lane_id() {
#ifdef GPU_SIM
  return sim::lane();
#else
  int lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
#endif
}

}  // namespace gpu
