// Scratch memory that survives from call to call. Fresh pages from the system cost about a microsecond per 4 KiB, which
// for the packed operands of a search is as long as packing itself; so up to 8 MiB of freed blocks are kept for reuse,
// until the system has no more to give. Blocks of 4 MiB and more are made of huge pages where the system has any: 40
// MiB are there in 2 instead of 16 ms.
#pragma once

#include <cstddef>

namespace hpk {

void* take_memory(size_t bytes);              // 64-byte aligned and uninitialised; throws std::bad_alloc
void give_memory(void* block, size_t bytes);  // the same number of bytes as was taken
void release_memory();                        // give the blocks that are kept back to the system
void poison_memory(bool on);                  // fill what is taken with NaN, so that tests see reads of unset memory

}  // namespace hpk
