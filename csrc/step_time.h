// How long a decoding step takes, guessed from when the tokens of those before were seen.
#pragma once

#include <algorithm>
#include <cstdint>

namespace llava_engine {

// Sleeping too long makes the next token late, too, and may let the device run out of launches; too
// short a sleep costs looks. So one late token counts little, and one that was there at the first
// look, where it may have been for long, makes the guess smaller.
class StepTime {
 public:
  // A step was seen `passed` after the one before; in_vain: it had been looked for in between.
  void seen(int64_t passed, bool in_vain) {
    if (!in_vain) {
      guess_ -= guess_ / 4;
    } else {
      guess_ = guess_ == 0 ? passed : std::min(passed, guess_ + guess_ / 8);
    }
  }
  // 0 until a step has told.
  int64_t guess() const { return guess_; }

 private:
  int64_t guess_ = 0;
};

}  // namespace llava_engine
