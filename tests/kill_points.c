/* Preloaded into a process, counts the calls that change files below a folder, and can kill the process at one.

   cc -shared -fPIC -O1 -o kill_points.so kill_points.c -ldl -lpthread; LD_PRELOAD=./kill_points.so, and

   KILL_POINTS_BELOW  the folder, as an absolute path without links
   KILL_POINTS_LOG    a file outside of it; a line for each point: number, nanoseconds, kind, name, path
   KILL_POINTS_AT     "NTH KIND NAME": SIGKILL just before the NTH call (from 1) of that kind on that name
   KILL_POINTS_HALF   set: a write that is killed writes half of its bytes first
   KILL_POINTS_AFTER  microseconds: the call is made, and the kill comes so much later
   KILL_POINTS_FULL   calls that need space fail with ENOSPC on paths that contain this

   A name is the path below the folder, every number and every long hexadecimal word in it replaced by '#'. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))real(#name))
#define ROOM (PATH_MAX * 2)

static atomic_long count, matches;

static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

static void die(void) {
  syscall(SYS_kill, getpid(), SIGKILL);
  for (;;) pause();
}

static void *die_later(void *microseconds) {
  long wait = (long)microseconds;
  struct timespec span = {wait / 1000000, wait % 1000000 * 1000};
  nanosleep(&span, NULL);
  die();
  return NULL;
}

static int is_hex(char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); }
static int is_digit(char c) { return c >= '0' && c <= '9'; }
static int is_word(char c) { return is_digit(c) || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }

static void name_of(const char *path, char *out) {
  while (*path) {
    const char *end = path;
    int hex = 1;
    while (is_word(*end)) hex &= is_hex(*end++);
    if (hex && end - path >= 12) {
      *out++ = '#';
      path = end;
      continue;
    }
    for (; path < end; path++)
      if (!is_digit(*path)) *out++ = *path;
      else if (path + 1 == end || !is_digit(path[1])) *out++ = '#';
    if (*path) *out++ = *path++;
  }
  *out = 0;
}

/* The absolute path that a call names, without its links; 0 if it is not below the folder. */
static int below(int folder, const char *path, char *full) {
  const char *root = getenv("KILL_POINTS_BELOW");
  if (!root || !path) return 0;
  size_t size = 0;
  if (path[0] != '/') {
    char link[64];
    if (folder == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t n = readlink(link, full, PATH_MAX);
    if (n <= 0) return 0;
    size = n;
    if (*path) full[size++] = '/';
  }
  snprintf(full + size, ROOM - size, "%s", path);
  size_t length = strlen(root);
  return !strncmp(full, root, length) && (full[length] == '/' || !full[length]);
}

/* 0: go on. 1: write half, then die. -1: fail for want of space. */
static int point(const char *kind, int folder, const char *path, int needs_space) {
  char full[ROOM], name[ROOM], line[3 * ROOM];
  int before = errno;
  if (!below(folder, path, full)) return 0;
  const char *root = getenv("KILL_POINTS_BELOW"), *log = getenv("KILL_POINTS_LOG"), *at = getenv("KILL_POINTS_AT");
  const char *after = getenv("KILL_POINTS_AFTER"), *space = getenv("KILL_POINTS_FULL");
  const char *inside = full + strlen(root) + (full[strlen(root)] == '/');
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  name_of(inside, name);
  int n = snprintf(line, sizeof line, "%ld\t%lld\t%s\t%s\t%s\n", atomic_fetch_add(&count, 1) + 1,
                   now.tv_sec * 1000000000LL + now.tv_nsec, kind, name, inside);
  int file = log ? syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644) : -1;
  if (file >= 0) {
    syscall(SYS_write, file, line, n);
    syscall(SYS_close, file);
  }
  if (at) {
    char *rest;
    long nth = strtol(at, &rest, 10);
    size_t width = strlen(kind);
    if (*rest == ' ' && !strncmp(rest + 1, kind, width) && rest[1 + width] == ' ' && !strcmp(rest + 2 + width, name) &&
        atomic_fetch_add(&matches, 1) + 1 == nth) {
      pthread_t thread;
      if (after) pthread_create(&thread, NULL, die_later, (void *)atol(after));
      else if (getenv("KILL_POINTS_HALF") && !strcmp(kind, "write")) return 1;
      else die();
    }
  }
  if (needs_space && space && strstr(full, space)) {
    errno = ENOSPC;
    return -1;
  }
  errno = before;
  return 0;
}

static int point_fd(const char *kind, int fd, int needs_space) {
  return fd > 2 ? point(kind, fd, "", needs_space) : 0;
}

static ssize_t half_vector(int fd, const struct iovec *parts) {
  REAL(write)(fd, parts[0].iov_base, parts[0].iov_len / 2);
  die();
  return -1;
}

#define MODE(flags) \
  mode_t mode = 0; \
  if ((flags) & (O_CREAT | __O_TMPFILE)) { \
    va_list rest; \
    va_start(rest, flags); \
    mode = va_arg(rest, mode_t); \
    va_end(rest); \
  }
#define CHANGES(flags) ((flags) & (O_CREAT | O_TRUNC))

int open(const char *path, int flags, ...) {
  MODE(flags)
  if (CHANGES(flags) && point("open", AT_FDCWD, path, 1)) return -1;
  return REAL(open)(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
  MODE(flags)
  if (CHANGES(flags) && point("open", AT_FDCWD, path, 1)) return -1;
  return REAL(open64)(path, flags, mode);
}
int openat(int folder, const char *path, int flags, ...) {
  MODE(flags)
  if (CHANGES(flags) && point("open", folder, path, 1)) return -1;
  return REAL(openat)(folder, path, flags, mode);
}
int openat64(int folder, const char *path, int flags, ...) {
  MODE(flags)
  if (CHANGES(flags) && point("open", folder, path, 1)) return -1;
  return REAL(openat64)(folder, path, flags, mode);
}
int creat(const char *path, mode_t mode) { return point("open", AT_FDCWD, path, 1) ? -1 : REAL(creat)(path, mode); }
int creat64(const char *path, mode_t mode) { return point("open", AT_FDCWD, path, 1) ? -1 : REAL(creat64)(path, mode); }
FILE *fopen(const char *path, const char *how) {
  return how[0] != 'r' && point("open", AT_FDCWD, path, 1) ? NULL : REAL(fopen)(path, how);
}
FILE *fopen64(const char *path, const char *how) {
  return how[0] != 'r' && point("open", AT_FDCWD, path, 1) ? NULL : REAL(fopen64)(path, how);
}

ssize_t write(int fd, const void *data, size_t size) {
  int found = point_fd("write", fd, 1);
  if (found < 0) return -1;
  ssize_t done = REAL(write)(fd, data, found ? size / 2 : size);
  if (found) die();
  return done;
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
  int found = point_fd("write", fd, 1);
  if (found < 0) return -1;
  ssize_t done = REAL(pwrite)(fd, data, found ? size / 2 : size, offset);
  if (found) die();
  return done;
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
  int found = point_fd("write", fd, 1);
  if (found < 0) return -1;
  ssize_t done = REAL(pwrite64)(fd, data, found ? size / 2 : size, offset);
  if (found) die();
  return done;
}
ssize_t writev(int fd, const struct iovec *parts, int n) {
  int found = point_fd("write", fd, 1);
  return found ? found < 0 ? -1 : half_vector(fd, parts) : REAL(writev)(fd, parts, n);
}
ssize_t pwritev(int fd, const struct iovec *parts, int n, off_t offset) {
  int found = point_fd("write", fd, 1);
  return found ? found < 0 ? -1 : half_vector(fd, parts) : REAL(pwritev)(fd, parts, n, offset);
}
ssize_t pwritev64(int fd, const struct iovec *parts, int n, off64_t offset) {
  int found = point_fd("write", fd, 1);
  return found ? found < 0 ? -1 : half_vector(fd, parts) : REAL(pwritev64)(fd, parts, n, offset);
}
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
  int found = point_fd("write", out, 1);
  if (found < 0) return -1;
  ssize_t done = REAL(copy_file_range)(in, from, out, to, found ? size / 2 : size, flags);
  if (found) die();
  return done;
}

int fsync(int fd) { return point_fd("fsync", fd, 1) < 0 ? -1 : REAL(fsync)(fd); }
int fdatasync(int fd) { return point_fd("fsync", fd, 1) < 0 ? -1 : REAL(fdatasync)(fd); }
int ftruncate(int fd, off_t size) { return point_fd("truncate", fd, 0), REAL(ftruncate)(fd, size); }
int ftruncate64(int fd, off64_t size) { return point_fd("truncate", fd, 0), REAL(ftruncate64)(fd, size); }
int truncate(const char *path, off_t size) { return point("truncate", AT_FDCWD, path, 0), REAL(truncate)(path, size); }
int truncate64(const char *path, off64_t size) {
  return point("truncate", AT_FDCWD, path, 0), REAL(truncate64)(path, size);
}

/* Named by where it goes: that is what it changes. */
int rename(const char *from, const char *to) { return point("rename", AT_FDCWD, to, 0), REAL(rename)(from, to); }
int renameat(int a, const char *from, int b, const char *to) {
  return point("rename", b, to, 0), REAL(renameat)(a, from, b, to);
}
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
  return point("rename", b, to, 0), REAL(renameat2)(a, from, b, to, flags);
}
int link(const char *from, const char *to) { return point("link", AT_FDCWD, to, 1) ? -1 : REAL(link)(from, to); }
int linkat(int a, const char *from, int b, const char *to, int flags) {
  return point("link", b, to, 1) ? -1 : REAL(linkat)(a, from, b, to, flags);
}
int symlink(const char *from, const char *to) { return point("link", AT_FDCWD, to, 1) ? -1 : REAL(symlink)(from, to); }

int unlink(const char *path) { return point("unlink", AT_FDCWD, path, 0), REAL(unlink)(path); }
int unlinkat(int folder, const char *path, int flags) {
  return point(flags & AT_REMOVEDIR ? "rmdir" : "unlink", folder, path, 0), REAL(unlinkat)(folder, path, flags);
}
int remove(const char *path) { return point("unlink", AT_FDCWD, path, 0), REAL(remove)(path); }
int rmdir(const char *path) { return point("rmdir", AT_FDCWD, path, 0), REAL(rmdir)(path); }
int mkdir(const char *path, mode_t mode) { return point("mkdir", AT_FDCWD, path, 1) ? -1 : REAL(mkdir)(path, mode); }
int mkdirat(int folder, const char *path, mode_t mode) {
  return point("mkdir", folder, path, 1) ? -1 : REAL(mkdirat)(folder, path, mode);
}
