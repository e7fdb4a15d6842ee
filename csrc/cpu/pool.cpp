#include "pool.h"

#include <algorithm>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

namespace fastgan {
namespace {

constexpr size_t kHugePage = size_t(2) << 20, kPage = 4096;

size_t rounded(size_t bytes) {
  const size_t unit = bytes >= kHugePage ? kHugePage : kPage;
  return (bytes + unit - 1) / unit * unit;
}

}  // namespace

// A block is larger than asked for; a sanitized build may use only what was.
void* Pool::acquire(size_t bytes, size_t* capacity) {
  char* block = static_cast<char*>(take(bytes, capacity));
  ASAN_UNPOISON_MEMORY_REGION(block, *capacity);
  ASAN_POISON_MEMORY_REGION(block + bytes, *capacity - bytes);
  return block;
}

void* Pool::take(size_t bytes, size_t* capacity) {
  const size_t wanted = rounded(bytes ? bytes : 1);
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = blocks_.lower_bound(wanted);
  if (found != blocks_.end() && double(found->first) <= double(wanted) * (1.0 + waste_)) {
    *capacity = found->first;
    void* block = found->second;
    blocks_.erase(found);
    idle_ -= *capacity;
    live_ += *capacity;
    peak_ = std::max(peak_, live_);
    return block;
  }
  // Sizes that are no longer asked for must not pile up: together the blocks take at most twice
  // what was ever in use at once.
  peak_ = std::max(peak_, live_ + wanted);
  trim_to(2 * peak_ - live_ - wanted);
  const size_t alignment = wanted >= kHugePage ? kHugePage : kPage;
  void* block = std::aligned_alloc(alignment, wanted);
  if (!block) {
    trim_to(0);
    block = std::aligned_alloc(alignment, wanted);
    if (!block) throw std::bad_alloc();
  }
#if defined(__linux__)
  if (wanted >= kHugePage) madvise(block, wanted, MADV_HUGEPAGE);
#endif
  *capacity = wanted;
  live_ += wanted;
  return block;
}

void Pool::release(void* block, size_t capacity) {
  ASAN_POISON_MEMORY_REGION(block, capacity);
  std::lock_guard<std::mutex> lock(mutex_);
  live_ -= capacity;
  idle_ += capacity;
  blocks_.emplace(capacity, block);
}

void Pool::trim() {
  std::lock_guard<std::mutex> lock(mutex_);
  trim_to(0);
  peak_ = live_;
}

// Frees idle blocks, the smallest first, until at most `idle` bytes of them are left.
void Pool::trim_to(size_t idle) {
  while (idle_ > idle) {
    const auto block = blocks_.begin();
    ASAN_UNPOISON_MEMORY_REGION(block->second, block->first);
    std::free(block->second);
    idle_ -= block->first;
    blocks_.erase(block);
  }
}

}  // namespace fastgan
