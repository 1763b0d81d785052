// The least that a pass over listed elements can do: fetch each one's line of memory ahead, read it, write it back.
#include <cstdint>
#include <thread>
#include <vector>

template <class Number>
void touch_some(Number* weights, const int64_t* indices, int64_t count, int64_t ahead) {
  for (int64_t i = 0; i < count; ++i) {
    if (i + ahead < count) __builtin_prefetch(weights + indices[i + ahead], 1);
    weights[indices[i]] ^= 1;
  }
}

extern "C" void touch(void* weights, int64_t size, const int64_t* indices, int64_t count, int64_t ahead,
                      int64_t threads) {
  const auto some = [=](int64_t k) {
    const int64_t begin = count * k / threads, end = count * (k + 1) / threads;
    if (size == 4)
      touch_some(static_cast<uint32_t*>(weights), indices + begin, end - begin, ahead);
    else
      touch_some(static_cast<uint16_t*>(weights), indices + begin, end - begin, ahead);
  };
  std::vector<std::thread> others;
  for (int64_t k = 1; k < threads; ++k) others.emplace_back(some, k);
  some(0);
  for (std::thread& other : others) other.join();
}
