// Hopper's matrix units: products of a warpgroup from tiles in shared memory, and the tensor copies
// that bring the tiles. PTX ISA 8.0, "Asynchronous warpgroup level matrix instructions" and
// "cp.async.bulk.tensor".
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "ring.cuh"

namespace llava_engine {

constexpr int kWarpgroup = 128;
constexpr int kSwizzleBytes = 128;  // a row of a tile; eight rows are one swizzled atom of 1 KB

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// A tile of rows of 128 bytes, swizzled as the tensor copies lay it down (CU_TENSOR_MAP_SWIZZLE_128B);
// `tile` is a multiple of 1024 plus the bytes into a row that the product starts at. Fields in units
// of 16 bytes: address, leading offset (not used with this swizzle), 1024 from one atom to the next.
__device__ inline uint64_t tile_descriptor(const void* tile) {
  uint64_t descriptor = (shared_address(tile) & 0x3ffff) >> 4;
  descriptor |= uint64_t{1} << 16;
  descriptor |= uint64_t{1024 >> 4} << 32;
  descriptor |= uint64_t{1} << 62;  // 128-byte swizzle
  return descriptor;
}

// Before the first product after the warpgroup's registers or shared memory were written otherwise.
__device__ inline void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// The same, where these registers are what the products take: nothing that makes them comes later.
__device__ inline void products_fence(unsigned (&a)[4][4]) {
#pragma unroll
  for (auto& four : a) {
    asm volatile("" : "+r"(four[0]), "+r"(four[1]), "+r"(four[2]), "+r"(four[3])::"memory");
  }
  products_fence();
}

__device__ inline void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until no more than kPending groups are under way.
template <int kPending>
__device__ inline void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Gives registers of a warpgroup to those that need them.
template <int kRegisters>
__device__ inline void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ inline void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
#endif

#if __CUDA_ARCH__ >= 900
// One thread asks for a box of a matrix whose first element is in `column` and `row`; what is outside
// the matrix comes as zero, and counts among the bytes.
__device__ inline void tensor_copy(void* to, const CUtensorMap* map, int column, int row,
                                   uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// The same of a matrix in parts (see parts_map), of all parts.
__device__ inline void tensor_copy_parts(void* to, const CUtensorMap* map, int column, int row,
                                         uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(0), "r"(shared_address(barrier))
      : "memory");
}

// tensor_copy into every block of the cluster that `mask` names, at the same place, each counting the
// bytes on its own barrier.
__device__ inline void tensor_copy_to_all(void* to, const CUtensorMap* map, int column, int row,
                                          uint64_t* barrier, uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(mask)
      : "memory");
}

__device__ inline void tensor_map_prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Arrives at the barrier that stands at this place in another block of the cluster: with the release
// of a block's scope, for a cluster's is a fence of half a microsecond. What it tells needs none: that
// products have read, and of ordinary loads and stores those that copies_fence and a barrier of the
// block have ordered before it.
__device__ inline void barrier_arrive_at(uint64_t* barrier, int block) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(block)
      : "memory");
}

__device__ inline int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Orders what the blocks of the cluster store, too.
__device__ inline void cluster_barrier() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
}

// Stores in the shared memory of another block of the cluster, where this one has `to`.
__device__ inline void store_at(void* to, int block, float4 values) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "st.shared::cluster.v4.f32 [there], {%2, %3, %4, %5};\n"
      "}\n" ::"r"(shared_address(to)),
      "r"(block), "f"(values.x), "f"(values.y), "f"(values.z), "f"(values.w)
      : "memory");
}

// Orders no stores of theirs (but barriers_ready has ordered the barriers').
__device__ inline void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.relaxed;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
}
#endif

// How boxes of box_rows x 128 bytes are copied from a matrix of rows x columns, row_stride bytes
// apart (a multiple of 16), into swizzled tiles. type: CU_TENSOR_MAP_DATA_TYPE_FLOAT16, ...
CUtensorMap matrix_map(const void* matrix, CUtensorMapDataType type, int element_bytes,
                       int64_t rows, int64_t columns, int64_t row_stride, int box_rows);

// The same of a matrix of so many parts of `rows` rows, one below the other: a box has box_rows of each
// part, part after part.
CUtensorMap parts_map(const void* matrix, CUtensorMapDataType type, int element_bytes, int parts,
                      int64_t rows, int64_t columns, int64_t row_stride, int box_rows);

}  // namespace llava_engine
