// Sums of very many numbers. Nothing here is a vector: where one number stands for thousands, what it costs to add it
// does not matter.
#pragma once

namespace fused_losses {

// What every addition rounds off is kept and added at the end: many equal terms are all rounded in one direction, and
// a plain sum of a million of them loses three digits and more.
class CompensatedSum {
 public:
  explicit CompensatedSum(double first = 0) : sum_(first) {}

  void add(double x) {
    const double next = sum_ + x, added = next - sum_;
    rest_ += (sum_ - (next - added)) + (x - added);
    sum_ = next;
  }

  void add(const CompensatedSum& other, double factor = 1) {
    add(other.sum_ * factor);
    rest_ += other.rest_ * factor;
  }

  // An infinite sum leaves NaN as its rest.
  double total() const { return rest_ == rest_ ? sum_ + rest_ : sum_; }

 private:
  double sum_, rest_ = 0;
};

}  // namespace fused_losses
