// Where the time of a session goes, operator by operator, as its calling thread sees it.
#pragma once
#include <array>
#include <chrono>
#include <cstddef>

#include "edgewise/pool.h"

namespace edgewise {

// Inputs: norms, rounding and placing of what linears read, and merging of attention's chunks. Wait: for other threads.
// Other: what lies between, such as waking the threads.
enum class Operator { Embed, Inputs, Qkv, Attention, Out, GateUp, Down, Experts, Cross, Head, Sampling, Wait, Other, Count };

// Every moment between enter() and leave() belongs to one operator, so the parts add up to the whole. Off, it costs a
// look at one flag.
class Profile {
 public:
  using Seconds = std::array<double, static_cast<size_t>(Operator::Count)>;

  explicit Profile(Pool& pool) : pool_(pool) {}
  bool on() const { return on_; }
  // Starts at zero.
  void turn(bool on) {
    on_ = on;
    pool_.time_waits(on);
    seconds_.fill(0);
    depth_ = 0;
  }
  const Seconds& seconds() const { return seconds_; }

  // While one lives, time is counted; inner ones change nothing.
  class Counting {
   public:
    explicit Counting(Profile& profile) : profile_(profile.on_ ? &profile : nullptr) {
      if (profile_ != nullptr && profile_->depth_++ == 0) profile_->begin();
    }
    ~Counting() {
      if (profile_ != nullptr && --profile_->depth_ == 0) profile_->mark(Operator::Other);
    }
    Counting(const Counting&) = delete;
    Counting& operator=(const Counting&) = delete;

   private:
    Profile* profile_;
  };

  // From here on, time belongs to this operator. By the calling thread alone.
  void mark(Operator next) {
    const auto now = std::chrono::steady_clock::now();
    const double waited = std::chrono::duration<double>(pool_.waited() - waited_).count();
    seconds_[static_cast<size_t>(now_)] += std::chrono::duration<double>(now - since_).count() - waited;
    seconds_[static_cast<size_t>(Operator::Wait)] += waited;
    since_ = now;
    waited_ = pool_.waited();
    now_ = next;
  }

  // What a linear belongs to that is of no phase.
  Operator unplanned = Operator::Other;

 private:
  void begin() {
    since_ = std::chrono::steady_clock::now();
    waited_ = pool_.waited();
    now_ = Operator::Other;
  }

  Pool& pool_;
  bool on_ = false;
  size_t depth_ = 0;
  Operator now_ = Operator::Other;
  std::chrono::steady_clock::time_point since_{};
  std::chrono::nanoseconds waited_{0};
  Seconds seconds_{};
};

}  // namespace edgewise
