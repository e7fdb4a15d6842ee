// Memory that is kept between calls.
//
// A step allocates the same few hundred megabytes every time. Handed back to the system, each page
// of them faults again on its next use, which costs as much as a convolution; so blocks are kept,
// and asked to be huge pages.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>

namespace fastgan {

class Pool {
 public:
  // `waste`: how much larger than asked for a block may be, as a fraction.
  explicit Pool(double waste) : waste_(waste) {}

  // At least `bytes` bytes, aligned to a page, uninitialised. Throws std::bad_alloc.
  void* acquire(size_t bytes, size_t* capacity);
  void release(void* block, size_t capacity);
  // Returns to the system what is not in use.
  void trim();
  size_t held_bytes() const { return live_ + idle_; }

 private:
  void* take(size_t bytes, size_t* capacity);
  void trim_to(size_t idle);

  const double waste_;
  std::mutex mutex_;
  std::multimap<size_t, void*> blocks_;  // idle, by capacity
  size_t live_ = 0, idle_ = 0, peak_ = 0;
};

}  // namespace fastgan
