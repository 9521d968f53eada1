// The loop that every textbook has: row by row, backwards in time, on one thread.
extern "C" void gae(const float* rewards, const float* values, float* advantages, float* returns, long rows, long steps,
                    float gamma, float lam) {
  for (long row = 0; row < rows; ++row) {
    const long begin = row * steps;
    float next_value = 0, advantage = 0;
    for (long t = begin + steps - 1; t >= begin; --t) {
      advantage = rewards[t] + gamma * next_value - values[t] + gamma * lam * advantage;
      next_value = values[t];
      advantages[t] = advantage;
      returns[t] = advantage + values[t];
    }
  }
}
