// Reads steps, "<time since the one before> <1 if it was looked for in vain>", and prints the guess
// after each.
#include "../../csrc/step_time.h"

#include <iostream>

int main() {
  llava_engine::StepTime time;
  int64_t passed;
  bool in_vain;
  while (std::cin >> passed >> in_vain) {
    time.seen(passed, in_vain);
    std::cout << time.guess() << '\n';
  }
}
