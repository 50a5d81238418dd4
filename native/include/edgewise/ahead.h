// What a thread reads in a pass over one token, in order, so that it can fetch it before it needs it.
//
// One token reads every weight, key and value once, so memory decides its time. Between two matrices a thread norms and
// rounds inputs, attends, or waits for others: memory would rest. What a thread reads next is known, so it keeps fetching
// all the while, across the ends of its stretches and from one token to the next.
#pragma once
#include <algorithm>
#include <vector>

#include "edgewise/kernels.h"
#include "edgewise/tuning.h"

namespace edgewise {

class ReadAhead {
 public:
  // How far ahead; see tuning.h.
  void limit(const Tuning& tuning) {
    nearest_ = tuning.ahead_nbytes;
    farthest_ = tuning.farthest_nbytes;
  }
  // Forgets everything and takes that many phases, each of them empty.
  void reset(size_t phases) {
    phases_.assign(phases, {});
    phase_ = stretch_ = position_ = fetched_ = 0;
  }
  void clear(size_t phase) { phases_[phase].stretches.clear(); }
  // What the phase reads next.
  void add(size_t phase, const uint8_t* data, size_t nbytes) {
    std::vector<Stretch>& stretches = phases_[phase].stretches;
    const size_t start = phases_[phase].nbytes();
    if (nbytes > 0) stretches.push_back({data, start, start + nbytes});
  }

  // A pass begins; what phases read is settled. What was fetched beyond the end of the last pass is the beginning of this.
  void begin() {
    fetched_ = fetched_ > total_ ? fetched_ - total_ : 0;
    if (fetched_ == 0) phase_ = stretch_ = 0;
    total_ = position_ = 0;
    for (Phase& phase : phases_) {
      phase.start = total_;
      total_ += phase.nbytes();
    }
  }
  void seek(size_t phase) { position_ = phases_[phase].start; }

  // What to fetch while the next nbytes in order, which lie at p, are read.
  Ahead over(const uint8_t* p, size_t nbytes) {
    const size_t from = std::max(fetched_, position_ + nearest_);
    position_ += nbytes;
    if (total_ == 0 || from > position_ + farthest_) return {nullptr, 0, 0};
    const size_t offset = find(from);
    const Stretch& stretch = at();
    fetched_ = from + nbytes;
    Ahead ahead;
    ahead.before = stretch.data + (offset - stretch.start) - p;
    ahead.turn = p + (stretch.end - offset);
    if (stretch.end - offset < nbytes) ahead.after = following().data - ahead.turn;
    return ahead;
  }

  // While there is nothing else to do: fetches up to nbytes.
  void fetch(size_t nbytes) {
    if (total_ == 0) return;
    fetched_ = std::max(fetched_, position_);
    for (const size_t end = std::min(fetched_ + nbytes, position_ + farthest_); fetched_ < end;) {
      const size_t offset = find(fetched_), n = std::min(end - fetched_, at().end - offset);
      for (size_t i = 0; i < n; i += 64) __builtin_prefetch(at().data + (offset - at().start) + i, 0, 2);
      fetched_ += n;
    }
  }

  // Bytes that are fetched but not read yet.
  size_t lead() const { return fetched_ > position_ ? fetched_ - position_ : 0; }

 private:
  struct Stretch {
    const uint8_t* data;
    size_t start, end;  // within the phase
  };
  struct Phase {
    std::vector<Stretch> stretches;
    size_t start = 0;
    size_t nbytes() const { return stretches.empty() ? 0 : stretches.back().end; }
  };
  const Stretch& at() const { return phases_[phase_].stretches[stretch_]; }
  const Stretch& following() const {
    if (stretch_ + 1 < phases_[phase_].stretches.size()) return phases_[phase_].stretches[stretch_ + 1];
    size_t phase = phase_;
    do phase = (phase + 1) % phases_.size();
    while (phases_[phase].stretches.empty());
    return phases_[phase].stretches.front();
  }
  // Moves to the stretch that holds a position of this pass, or of the next one where it lies beyond the end. Returns the
  // offset within its phase.
  size_t find(size_t position) {
    position %= total_;
    const Phase& now = phases_[phase_];
    if (position < now.start || position >= now.start + now.nbytes()) {
      stretch_ = 0;
      do phase_ = (phase_ + 1) % phases_.size();
      while (position < phases_[phase_].start || position >= phases_[phase_].start + phases_[phase_].nbytes());
    }
    const size_t offset = position - phases_[phase_].start;
    if (offset < at().start) stretch_ = 0;
    while (offset >= at().end) ++stretch_;
    return offset;
  }

  std::vector<Phase> phases_;
  size_t nearest_ = Tuning{}.ahead_nbytes, farthest_ = Tuning{}.farthest_nbytes;
  size_t total_ = 0, position_ = 0, fetched_ = 0, phase_ = 0, stretch_ = 0;
};

}  // namespace edgewise
