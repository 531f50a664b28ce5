// What a thread gets: its share of the work, and scratch memory.
#pragma once

#include "kernels.h"

namespace fused_losses {
namespace FUSED_LOSSES_ISA {

// body(begin, end) over pieces of [0, n) of at least `grain` items.
template <class Body>
inline void parallel(int64_t n, int64_t grain, const Body& body) {
  parallel_for(n, grain, const_cast<Body*>(&body),
               [](void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); });
}

// Uninitialised memory with an owner. (std::vector would leave a copy of its code, made for this instruction set, for
// the linker to choose for everybody.)
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : data_(static_cast<T*>(std::malloc(sizeof(T) * (n > 0 ? n : 1)))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* get() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }

 private:
  T* data_;
};

}  // namespace FUSED_LOSSES_ISA
}  // namespace fused_losses
