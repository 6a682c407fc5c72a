/* Preloaded into a process, it shifts the wall clock (SHIFT_CLOCK_S, seconds) or stops it (STOP_CLOCK_AT_S, unix
   seconds). Monotonic clocks are left alone, as when the clock of a host is wrong. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t id, struct timespec *now) {
  long answer = syscall(SYS_clock_gettime, id, now);
  if (answer == 0 && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) {
    const char *stopped = getenv("STOP_CLOCK_AT_S"), *shift = getenv("SHIFT_CLOCK_S");
    if (stopped) {
      now->tv_sec = atoll(stopped);
      now->tv_nsec = 0;
    } else if (shift) {
      now->tv_sec += atoll(shift);
    }
  }
  return (int)answer;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  (void)zone;
  struct timespec exact;
  if (clock_gettime(CLOCK_REALTIME, &exact) != 0) return -1;
  now->tv_sec = exact.tv_sec;
  now->tv_usec = exact.tv_nsec / 1000;
  return 0;
}

time_t time(time_t *out) {
  struct timespec exact;
  clock_gettime(CLOCK_REALTIME, &exact);
  if (out) *out = exact.tv_sec;
  return exact.tv_sec;
}
